"""Public files by name: `catalogue:<file name>` is taken from `DATA_DIR`, from the cache folder, or downloaded once.

Every entry has a SHA-256 checksum: a file that differs is never read. Entries without an address are files whose
providers do not offer the very same bytes; put them into `DATA_DIR`.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from data.sources.location import cache_folder


@dataclass(frozen=True)
class Entry:
    """sha256 of the file, where to get it (None: only from `DATA_DIR`), and where it comes from."""

    sha256: str
    origin: str
    url: str | None = None


_XARRAY_DATA = "https://github.com/pydata/xarray-data/raw/master/"

CATALOGUE = {
    "air_temperature.nc": Entry(
        "c606b89c35970a2983b914b76df4adbb409003ef34aa7cfd7f582e41f307482b",
        "NCEP reanalysis 1, air temperature, 6-hourly 2013-2014, North America",
        _XARRAY_DATA + "air_temperature.nc",
    ),
    "era5_2mt_2019_03_uk.nc": Entry(
        "9e25ba514ec65bbdb92dc8e071dc2c7ab8d4405ec8bd2ab0c907c205862190d6",
        "ERA5 2 m temperature, hourly March 2019, British Isles, converted from era5-2mt-2019-03-uk.grib of "
        "pydata/xarray-data",
    ),
    "ncep_slp_natl_2001_2010.nc": Entry(
        "be479679a7a7a03595fbfcdf4e453f0ccdee8ccb20a39873f65f5df9c44ccb52",
        "NCEP reanalysis 1, sea-level pressure, daily 2001-2010, North Atlantic",
    ),
    "sst.mnmean.nc": Entry(
        "eade01e2085d841f2ff94fa6886b08a65c5018f576b066c57880726006f28ba6",
        "NOAA ERSSTv5, monthly sea surface temperature 2010-01 to 2020-08",
    ),
    "alboranSST_small.nc": Entry(
        "d1ccbab330642e47c9c23df046333ce2df2eb30c346acc4d3b806047ddc29e3b",
        "Sea surface temperature of the Alboran Sea with cloud gaps, daily May 2017, from aida-alvera/DINEOF",
    ),
    "mitgcm_global_ocean_4deg_monthly.nc": Entry(
        "37cf0442f90f7afde4acc08d3eca2bc5acb48e6d9234c853b7ade536ff4a67a8",
        "Observed monthly ocean climatology of the MITgcm tutorials, 4 degrees",
    ),
    "mitgcm_global_ocean_2p8deg_monthly.nc": Entry(
        "f0cf953859ac639a0334cf902807268179db142e2e71f5ab598fc1c32b025715",
        "Observed monthly ocean surface climatology of the MITgcm tutorials, 2.8 degrees",
    ),
    "wc13_obs.nc": Entry(
        "2e87c7f197e23da5ff2507b22042786575fdf6479eb8a6c2af3ff57341c438f4",
        "Ocean observations of 2004-01-03 to 07 off California, ROMS format, from NCAR/DART",
    ),
    "wc13_mod.nc": Entry(
        "9a6f100c87cb1f16a2286f484d89e51172cb43d818b41405734dd3de54a11002",
        "ROMS 4D-Var background and analysis at the observations of wc13_obs.nc, from NCAR/DART",
    ),
    "wc13_grd.nc": Entry(
        "9e75c0f54f777db5d7a98c5bc6475f2df1b9c19275a6980d33c9ac26bf22ea33",
        "Grid of the ROMS model behind wc13_mod.nc, from NCAR/DART",
    ),
    "knmi_rad_nl25_20100826_5min.nc": Entry(
        "214116e222331d3330de894dd779f0fb4c058ae37f99bea5c4d44cceb6db1acb",
        "KNMI radar composite of 2010-08-26 00:00 to 07:35, 5 minutes, 1 km, from pySTEPS/pysteps-data",
    ),
    "mrms_preciprate_20190610_512crop.nc": Entry(
        "e81008e55253b46fa199d16ff30e52551d794fccd2aabed7d46298da6738b91f",
        "NOAA MRMS rain rates of 2019-06-10 00:00 to 01:10, 2 minutes, 0.01 degrees, from pySTEPS/pysteps-data",
    ),
    "obs_seq.final.1000": Entry(
        "4c41d36a07287909e4957fb75f75f15d894617f9c340b4e90ff1a5d02ad2d815",
        "1,000 aircraft observations of 2019-12-01 with 80 members, DART text, from NCAR/pyDARTdiags",
    ),
    "2020100106_metars.csv": Entry(
        "6bddcb59f1489e030aa25aa81aa6d5df7d47b08e5968731739fe43108c15761c",
        "METARs of 2020-10-01 05:31 to 06:30, from JCSDA ioda-converters",
    ),
    "2005082600_metar.nc.gz": Entry(
        "672fc571b2a081a5caa12c8a8f139da37562a1373eaf070205e0651fbc838227",
        "METARs of 2005-08-26 00 UTC, MADIS NetCDF, from NCAR/DART",
    ),
    "2005082600_acars.nc.gz": Entry(
        "834126dd8bca678db822c082537482867d0429bb2a4f2bf3e14e9e7d9327e2a2",
        "Aircraft reports of 2005-08-26 00 UTC, MADIS NetCDF, from NCAR/DART",
    ),
    "amsa_55.bufr": Entry(
        "c61abd1c5cd2b892efbb2a37b36378f7adf0757c45ce5c05b2c998a99a581566",
        "AMSU-A brightness temperatures, BUFR, from ywangd/pybufrkit",
    ),
    "atms_201.bufr": Entry(
        "e8b73f2cc20abdcb8ec3e1347a90fb57a58de981069f2311fad0449a742d5c7b",
        "ATMS brightness temperatures, BUFR, from ywangd/pybufrkit",
    ),
}


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str) -> Path:
    """Path of a catalogue file: the copy in `DATA_DIR`, else the one in the cache folder, else a verified download.

    Raises ValueError for an unknown name and OSError for a wrong checksum or where no copy can be had.
    """
    if name not in CATALOGUE:
        raise ValueError(f"unknown catalogue file {name!r}; allowed: {', '.join(sorted(CATALOGUE))}")
    entry = CATALOGUE[name]
    own = Path(os.environ["DATA_DIR"]).expanduser() / name if os.environ.get("DATA_DIR") else None
    if own is not None and own.is_file():
        found = _checksum(own)
        if found != entry.sha256:
            raise OSError(
                f"{own} is not the catalogue's file: its sha256 is {found[:12]}..., expected "
                f"{entry.sha256[:12]}...; replace it, "
                f"or read it as it is with data.path={own}"
            )
        return own
    folder = cache_folder("catalogue")
    cached = folder / name
    if cached.is_file() and _checksum(cached) == entry.sha256:
        return cached
    if entry.url is None:
        raise FileNotFoundError(
            f"{name} ({entry.origin}) has no public download; put it into a folder and set DATA_DIR to that "
            f"folder, or into {folder}"
        )
    return _download(name, entry, folder)


def _download(name: str, entry: Entry, folder: Path) -> Path:
    import logging

    import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        # pooch writes beside the target, verifies, then renames: a broken download leaves nothing behind.
        downloader = pooch.HTTPDownloader(timeout=30)
        return Path(pooch.retrieve(entry.url, f"sha256:{entry.sha256}", fname=name, path=folder, downloader=downloader))
    except ValueError as error:
        raise OSError(
            f"{entry.url} does not have the expected sha256 {entry.sha256[:12]}... (changed, or a proxy page); "
            "put the right file "
            f"into a folder and set DATA_DIR to it"
        ) from error
    except (OSError, requests.RequestException) as error:
        raise OSError(
            f"cannot download {entry.url} ({type(error).__name__}); without network, put {name} into a folder "
            "and set DATA_DIR "
            f"to it, or into {folder}"
        ) from error
