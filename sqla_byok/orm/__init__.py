"""What SQLAlchemy sees: the types, the comparator, the sibling schema and the steps of a statement."""

# Both work by being imported: one gives the types their operators, the other listens to the schema's events.
from sqla_byok.orm import comparator as comparator
from sqla_byok.orm import schema as schema
