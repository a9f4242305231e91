"""The tasks: how data of a domain becomes labelled inputs, and the models for them."""
