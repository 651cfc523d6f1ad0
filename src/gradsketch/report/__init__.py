"""From results to self-contained pages and terminal tables; reads result objects only."""

from gradsketch.report.hits import hits_page

__all__ = ["hits_page"]
