"""What is known of an observation besides its value, as numbers of order one: the features a tokenizer reads.

Three layouts, by their length. All begin with the local solar time as Fourier series (2) and the time dt from the frame
in days with its square (6 features in all); Fourier(k) is k sines, then k cosines of 2 pi j x, j = 1 .. k.

    28  height / 60 km (4), pressure / 1100 hPa (4) as Fourier series; scan angle / 50 deg, cosine of the satellite
        zenith angle, each with its square; cosine and sine of the solar zenith angle
    30  sine and cosine of dt and of the latitude, then 20 numbers whose meaning depends on the row: height (5) and
        pressure (5) where it has a height, else scan angle / 50 deg (3), satellite zenith / 90 deg (4), solar zenith /
        180 deg (3), all as Fourier series
    50  as 30, but satellite rows fill features 10 to 29 and rows with a height 30 to 49; the others are 0

A quantity that a row does not have (NaN, or no such column) is 0 in every feature. Letters: n rows.
"""

from __future__ import annotations

from torch import Tensor

from data.observations import Observations
from kernels.film_tokenizer import LAYOUTS
from kernels.film_tokenizer.features import vectorised


def features(observations: Observations, num_features: int) -> Tensor:
    """(n, num_features) float32. Raises ValueError for another number of features and for rows without a place or time.

    Angles are computed in float64.
    """
    return vectorised(vars(described(observations, num_features)), num_features)


def described(observations: Observations, num_features: int) -> Observations:
    """The observations, refused where such features cannot be computed from them."""
    if num_features not in LAYOUTS:
        raise ValueError(
            f"{num_features} observation features is none of the layouts {LAYOUTS}; give the observations their own"
        )
    for name in ("time_offset", "longitude", "latitude"):
        if getattr(observations, name) is None:
            raise ValueError(f"observations without {name} cannot be described; give them their own features")
    return observations
