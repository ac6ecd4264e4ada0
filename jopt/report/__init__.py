"""What a run comes to: cost, table, plots, and one page that tells it all."""

from jopt.trace import flops as flops

from ._cost import Latency as Latency
from ._cost import latency as latency
from ._cost import machine as machine
from ._cost import memory as memory
from ._plots import losses as losses
from ._plots import sparsity as sparsity
from ._plots import tradeoff as tradeoff
from ._rows import Metric as Metric
from ._rows import Row as Row
from ._rows import rich_table as rich_table
from ._rows import table as table
from ._write import write as write
