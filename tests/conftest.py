"""What every test shares: how hypothesis generates its examples."""

from hypothesis import settings

# The same examples in every run and on every machine, however slow.
settings.register_profile("ci", derandomize=True, deadline=None)
# `pytest --hypothesis-profile=explore`: new examples each time, many of them.
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("ci")
