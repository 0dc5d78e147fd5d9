"""The runtime type checker of the tests: beartype, where a whole number will do for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
