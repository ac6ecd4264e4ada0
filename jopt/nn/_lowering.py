"""One operation, another implementation on each platform: `jopt.backends` says which, XLA when."""

from collections.abc import Callable, Mapping

import jax

from jopt import backends

Implementation = Callable[..., jax.Array]


def by_platform(
    choice: Callable[[backends.Choices], str],
    implementations: Mapping[str, Implementation],
    *operands: jax.Array,
) -> jax.Array:
    """Calls, on each platform, the implementation that `choice` names there.

    One trace holds them all and each lowering keeps its own, so a program exported for several
    platforms is as good on each as one traced there. Where all platforms agree there is nothing to
    choose, and the trace holds the one.
    """
    default = implementations[choice(backends.choices("default"))]
    chosen = {
        platform: implementations[choice(choices)] for platform, choices in backends.CHOICES.items()
    }
    others = {platform: chosen[platform] for platform in chosen if chosen[platform] is not default}
    if not others:
        return default(*operands)
    return jax.lax.platform_dependent(*operands, default=default, **others)
