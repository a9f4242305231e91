"""Numbers, sentences, tables and files of a report."""
