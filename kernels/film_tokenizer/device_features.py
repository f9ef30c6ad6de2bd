"""The features of observations as Triton computes them, in registers: a row's numbers -> a tile of its features.

Phases are reduced to half a turn in float64, a few operations a number; sines are float32, a series of which the first
term left out is below 6e-8 within a quarter turn. What a row does not have (NaN) is 0 in every feature.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join_columns(
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, ROWS: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """Sixteen (ROWS,) -> (ROWS, 16) of dtype FACTOR; halves are joined, then quarters, eighths and pairs."""
    a0, a1, a2, a3, a4, a5, a6, a7 = (
        a0.to(FACTOR), a1.to(FACTOR), a2.to(FACTOR), a3.to(FACTOR),
        a4.to(FACTOR), a5.to(FACTOR), a6.to(FACTOR), a7.to(FACTOR),
    )  # fmt: skip
    a8, a9, a10, a11, a12, a13, a14, a15 = (
        a8.to(FACTOR), a9.to(FACTOR), a10.to(FACTOR), a11.to(FACTOR),
        a12.to(FACTOR), a13.to(FACTOR), a14.to(FACTOR), a15.to(FACTOR),
    )  # fmt: skip
    b0, b1, b2, b3 = tl.join(a0, a8), tl.join(a1, a9), tl.join(a2, a10), tl.join(a3, a11)
    b4, b5, b6, b7 = tl.join(a4, a12), tl.join(a5, a13), tl.join(a6, a14), tl.join(a7, a15)
    c0, c1, c2, c3 = tl.join(b0, b4), tl.join(b1, b5), tl.join(b2, b6), tl.join(b3, b7)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (ROWS, 16))


@triton.jit
def beside(left, right, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Two (ROWS, WIDTH) -> (ROWS, 2 WIDTH)."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, 2 * WIDTH))


@triton.jit
def column(start, first, row, exists, ROWS: tl.constexpr):
    """Numbers of rows; NaN where there is no such column."""
    if start is None:
        numbers = tl.full((ROWS,), float("nan"), tl.float32)
    else:
        numbers = tl.load(start + first + row, mask=exists, other=0.0).to(tl.float32)
    return numbers


@triton.jit
def sine(turns):
    """Of at most a quarter turn either way."""
    x = turns * 6.283185307179586
    y = x * x
    series = 1.0 / 362880.0 + y * (-1.0 / 39916800.0)
    series = 1.0 / 120.0 + y * (-1.0 / 5040.0 + y * series)
    return x + x * y * (-1.0 / 6.0 + y * series)


@triton.jit
def turn(phase):
    """Sine and cosine of a phase in turns, float64; both 0 where it is NaN."""
    phase = tl.where(phase == phase, phase - tl.floor(phase + 0.5), 1.0).to(tl.float32)
    far = tl.abs(phase)
    near = tl.minimum(far, 0.5 - far)
    sines, cosines = sine(tl.where(phase < 0.0, -near, near)), sine(0.25 - far)
    return tl.where(far < 1.0, sines, 0.0), tl.where(far < 1.0, cosines, 0.0)


@triton.jit
def onwards(sines, cosines, first_sines, first_cosines):
    """Sine and cosine of the next harmonic."""
    return sines * first_cosines + cosines * first_sines, cosines * first_cosines - sines * first_sines


@triton.jit
def fraction(x, unit: tl.constexpr):
    """x / unit within 0 .. 1; NaN stays."""
    x = x.to(tl.float64) * (1.0 / unit)
    return tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))


@triton.jit
def moment(elapsed, seconds, batch, frame, longitude, first, row, exists, num_frames):
    """Local solar time (turns, float64) and days from the frame. seconds: of the day, of frames."""
    elapsed = tl.load(elapsed + first + row, mask=exists, other=0)
    sample = tl.load(batch + first + row, mask=exists, other=0).to(tl.int32)
    index = sample * num_frames + tl.load(frame + first + row, mask=exists, other=0).to(tl.int32)
    days = elapsed.to(tl.float32) / 86400.0
    second = tl.load(seconds + index, mask=exists, other=0) + elapsed % 86400  # of the sign of elapsed
    second = tl.where(second < 0, second + 86400, tl.where(second < 86400, second, second - 86400))
    degrees = tl.load(longitude + first + row, mask=exists, other=0.0).to(tl.float64)
    return second.to(tl.float64) * (1.0 / 86400.0) + degrees * (1.0 / 360.0), days


@triton.jit
def features(
    latitude, longitude, elapsed, seconds, batch, frame, height, pressure, scan, view, sun,
    first, row, exists, num_frames, LAYOUT: tl.constexpr, ROWS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """(ROWS, 32), of layout 50 (ROWS, 64); columns behind the features are 0; of dtype FACTOR."""
    phase, d = moment(elapsed, seconds, batch, frame, longitude, first, row, exists, num_frames)
    ls1, lc1 = turn(phase)
    ls2, lc2 = onwards(ls1, lc1, ls1, lc1)
    z = tl.zeros((ROWS,), tl.float32)
    height = column(height, first, row, exists, ROWS)
    in_place = height == height
    hs1, hc1 = turn(fraction(height, 60000.0))
    hs2, hc2 = onwards(hs1, hc1, hs1, hc1)
    hs3, hc3 = onwards(hs2, hc2, hs1, hc1)
    hs4, hc4 = onwards(hs3, hc3, hs1, hc1)
    ps1, pc1 = turn(fraction(column(pressure, first, row, exists, ROWS), 1100.0))
    ps2, pc2 = onwards(ps1, pc1, ps1, pc1)
    ps3, pc3 = onwards(ps2, pc2, ps1, pc1)
    ps4, pc4 = onwards(ps3, pc3, ps1, pc1)
    scan = column(scan, first, row, exists, ROWS)
    view = column(view, first, row, exists, ROWS).to(tl.float64)
    sun = column(sun, first, row, exists, ROWS).to(tl.float64)
    if LAYOUT == 28:
        scan = tl.where(scan == scan, scan / 50.0, 0.0)
        _, view = turn(view * (1.0 / 360.0))
        ss, sc = turn(sun * (1.0 / 360.0))
        left = join_columns(
            ls1, ls2, lc1, lc2, d, d * d, hs1, hs2, hs3, hs4, hc1, hc2, hc3, hc4, ps1, ps2, ROWS, FACTOR
        )
        right = join_columns(
            ps3, ps4, pc1, pc2, pc3, pc4, scan, scan * scan, view, view * view, sc, ss, z, z, z, z, ROWS, FACTOR
        )
        tile = beside(left, right, ROWS, 16)
    else:
        hs5, hc5 = onwards(hs4, hc4, hs1, hc1)
        ps5, pc5 = onwards(ps4, pc4, ps1, pc1)
        as1, ac1 = turn(scan.to(tl.float64) * (1.0 / 50.0))
        as2, ac2 = onwards(as1, ac1, as1, ac1)
        as3, ac3 = onwards(as2, ac2, as1, ac1)
        vs1, vc1 = turn(view * (1.0 / 90.0))
        vs2, vc2 = onwards(vs1, vc1, vs1, vc1)
        vs3, vc3 = onwards(vs2, vc2, vs1, vc1)
        vs4, vc4 = onwards(vs3, vc3, vs1, vc1)
        ss1, sc1 = turn(sun * (1.0 / 180.0))
        ss2, sc2 = onwards(ss1, sc1, ss1, sc1)
        ss3, sc3 = onwards(ss2, sc2, ss1, sc1)
        north, across = turn(tl.load(latitude + first + row, mask=exists, other=0.0).to(tl.float64) * (1.0 / 360.0))
        ds, dc = turn(d.to(tl.float64) * 0.15915494309189535)
        first = join_columns(
            ls1, ls2, lc1, lc2, d, d * d, ds, dc, north, across, as1, as2, as3, ac1, ac2, ac3, ROWS, FACTOR
        )
        if LAYOUT == 30:
            second = join_columns(
                vs1, vs2, vs3, vs4, vc1, vc2, vc3, vc4, ss1, ss2, ss3, sc1, sc2, sc3, z, z, ROWS, FACTOR
            )
            seen = beside(first, second, ROWS, 16)
            first = join_columns(
                ls1, ls2, lc1, lc2, d, d * d, ds, dc, north, across, hs1, hs2, hs3, hs4, hs5, hc1, ROWS, FACTOR
            )
            second = join_columns(
                hc2, hc3, hc4, hc5, ps1, ps2, ps3, ps4, ps5, pc1, pc2, pc3, pc4, pc5, z, z, ROWS, FACTOR
            )
            tile = tl.where(in_place[:, None], beside(first, second, ROWS, 16), seen)
        else:
            second = join_columns(
                vs1, vs2, vs3, vs4, vc1, vc2, vc3, vc4, ss1, ss2, ss3, sc1, sc2, sc3, hs1, hs2, ROWS, FACTOR
            )
            third = join_columns(
                hs3, hs4, hs5, hc1, hc2, hc3, hc4, hc5, ps1, ps2, ps3, ps4, ps5, pc1, pc2, pc3, ROWS, FACTOR
            )
            fourth = join_columns(pc4, pc5, z, z, z, z, z, z, z, z, z, z, z, z, z, z, ROWS, FACTOR)
            tile = beside(beside(first, second, ROWS, 16), beside(third, fourth, ROWS, 16), ROWS, 32)
            index = tl.arange(0, 64)[None, :]
            tile = tl.where((index < 10) | ((index >= 30) == in_place[:, None]), tile, 0.0).to(FACTOR)
    return tile
