"""Results as figures and self-contained pages."""
