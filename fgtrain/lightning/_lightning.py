"""What fgtrain uses of Lightning that its documentation does not promise, in one place.

tests/test_private_api.py says which release broke it.
"""

from lightning.pytorch.core.optimizer import _configure_optimizers

configure_optimizers = _configure_optimizers
"""(optimizers, scheduler configurations, monitor) of whatever a module's configure_optimizers may return."""
