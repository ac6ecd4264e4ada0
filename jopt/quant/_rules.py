"""Every module that registers rules for `lift`; importing this one registers them all."""

from ._leaves import cache_rules as cache_rules
from ._leaves import sum as sum
from ._leaves import views as views
from ._products import rules as rules
from ._training import products as products
