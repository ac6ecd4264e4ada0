"""The train step, the loop over steps, checkpoints, metrics and progress.

`make_step` compiles one step from a loss and an optax transformation; `fit` runs it over a
`Feed`, writes checkpoints, and goes on from the newest one. Compression acts in the loss (fake
quantization, distillation) and in the transformation (masks, schedules): the loop knows nothing
of it.
"""

from ._checkpoint import CheckpointError as CheckpointError
from ._checkpoint import Checkpoints as Checkpoints
from ._checkpoint import Restored as Restored
from ._diverged import TrainingDiverged as TrainingDiverged
from ._feed import Feed as Feed
from ._loop import fit as fit
from ._metrics import MetricLog as MetricLog
from ._progress import Progress as Progress
from ._record import History as History
from ._state import Aux as Aux
from ._state import State as State
from ._state import init as init
from ._state import replicate as replicate
from ._state import unreplicate as unreplicate
from ._step import Step as Step
from ._step import make_step as make_step
