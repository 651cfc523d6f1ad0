"""Which training examples caused this output?"""

from gradsketch.attribution.build import Build, Plan, build_index
from gradsketch.attribution.index import Index
from gradsketch.attribution.results import Hit, Hits, QueryHits, SelfInfluence

__all__ = ["Build", "Hit", "Hits", "Index", "Plan", "QueryHits", "SelfInfluence", "build_index"]
