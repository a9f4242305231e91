"""Numbers, sentences, tables and JSON of a report."""
