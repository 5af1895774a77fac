"""The theorems that stand behind the ledger's numbers, in words for people.

Certificates of version 2 hold the words of `pld` and `filter`: other words need a new version.
"""

from __future__ import annotations

from typing import Final

THEOREMS: Final = {
    "pld": (
        "epsilon of one mechanism planned in advance: privacy loss distribution, rounded "
        "pessimistically (Koskela, Jalko, Honkela 2020, arXiv:1906.03049; Doroshenko et al. 2022, "
        "arXiv:2207.04380)"
    ),
    "renyi": (
        "Renyi divergence of the Poisson-sampled Gaussian mechanism under add-or-remove-one: "
        "Mironov 2017, arXiv:1702.07476; Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3"
    ),
    "conversion": (
        "Renyi divergence to (epsilon, delta): Canonne, Kamath, Steinke 2020, arXiv:2004.00010, "
        "Proposition 12"
    ),
    "filter": (
        "jobs chosen after earlier results were seen: privacy filter at one Renyi order fixed when "
        "the pool is made (Feldman, Zrnic 2020, arXiv:2008.11193)"
    ),
    "parallel": (
        "jobs on blocks that share nobody: parallel composition (McSherry 2009, "
        "doi:10.1145/1559845.1559850, theorem 4; in a filter the individual losses of Feldman, "
        "Zrnic 2020, arXiv:2008.11193)"
    ),
    "concurrency": (
        "jobs that run at the same time: a filter for fixed-order Renyi privacy also holds for "
        "concurrent interactive mechanisms (Haney et al. 2023, arXiv:2309.05901)"
    ),
}
