"""Which training examples caused this output?"""

from gradsketch.attribution.build import Build, build_index
from gradsketch.attribution.index import Index
from gradsketch.attribution.plan import Plan
from gradsketch.attribution.results import Hit, Hits, QueryHits, SelfInfluence

__all__ = ["Build", "Hit", "Hits", "Index", "Plan", "QueryHits", "SelfInfluence", "build_index"]
