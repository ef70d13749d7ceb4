"""Evidence for the record: each module runs as ``python -m tests.assurance.NAME``."""
