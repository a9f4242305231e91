"""Sound for every task on recordings: files read, resampled, turned into mel spectra, and synthetic voices."""
