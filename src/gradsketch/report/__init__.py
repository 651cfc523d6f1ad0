"""From results to figures and self-contained pages: draws what it is handed, and imports no application."""
