"""The ops in plain torch: the backend that runs everywhere, and the one the others are tested against."""
