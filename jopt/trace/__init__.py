"""Any JAX function, traced and evaluated again: on typed leaves, with statistics, site by site."""

from .axes import Along as Along
from .axes import axes as axes
from .constants import Constant as Constant
from .constants import constants as constants
from .frame import Met as Met
from .hoist import hoist as hoist
from .layered import Layered as Layered
from .layered import Table as Table
from .leaf import Leaf as Leaf
from .rules import rule as rule
from .sites import Site as Site
from .sites import Use as Use
from .sites import flops as flops
from .sites import sites as sites
from .stages import staged as staged
from .stats import Stat as Stat
from .stats import merge as merge
from .stops import Stop as Stop
from .stops import Target as Target
from .stops import target_of as target_of
from .taps import Tap as Tap
from .taps import tappable as tappable
from .taps import taps as taps
from .walk import Call as Call
from .walk import collect as collect
from .walk import explain as explain
from .walk import lift as lift
from .watch import Activation as Activation
from .watch import Measure as Measure
from .watch import Watched as Watched
from .watch import gram as gram
from .watch import moments as moments
from .watch import watched as watched

# Importing these registers what `lift` does with constructs that have bodies, and with operations
# that change no value.
from . import control as control  # isort: skip
from . import shards as shards  # isort: skip
from . import through as through  # isort: skip
