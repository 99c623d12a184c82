"""Schedule profiles: named, ordered lists of DLight rules per backend, with their parameters."""

from profiles.errors import ProfileError
from profiles.profile import Profile, RuleUse, list_profiles, load_profile, read_profile
from profiles.rules import Parameter, Rule, known_rules

__all__ = [
    "Parameter",
    "Profile",
    "ProfileError",
    "Rule",
    "RuleUse",
    "known_rules",
    "list_profiles",
    "load_profile",
    "read_profile",
]
