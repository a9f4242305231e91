"""Files that are whole or absent, tensors with a checksum, and one writer a folder."""
