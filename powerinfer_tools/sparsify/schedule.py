"""What changes while a student learns, by the share of the training tokens that are done."""

import math

WARMUP = 0.03  # share of the tokens over which the learning rate rises
FIRST_ACTIVE = 0.6  # active share that training begins with: what a model loses there it soon learns again
RAMP = 0.25  # share of the tokens over which the active share falls to the wanted one


def learning_rate(peak: float, done: float) -> float:
    """Rises in a line, then falls along a cosine to 0. done: 0 to 1."""
    if done < WARMUP:
        return peak * done / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def wanted_active(active: float, done: float) -> float:
    """Falls in a line from FIRST_ACTIVE to the wanted share, and stays there."""
    first = max(active, FIRST_ACTIVE)
    return first + (active - first) * min(1.0, done / RAMP)
