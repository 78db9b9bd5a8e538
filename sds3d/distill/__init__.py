"""Score distillation: ``core`` turns a method's direction into a gradient; each method is a file, listed here."""

from sds3d.distill.bridge import Bridge
from sds3d.distill.core import Method
from sds3d.distill.csd import CSD
from sds3d.distill.dds import DDS
from sds3d.distill.diffinstruct import DiffInstruct
from sds3d.distill.dmd import DMD
from sds3d.distill.dmd2 import DMD2
from sds3d.distill.ism import ISM
from sds3d.distill.nfsd import NFSD
from sds3d.distill.sdi import SDI
from sds3d.distill.sds import SDS
from sds3d.distill.vsd import VSD

METHODS: dict[str, type[Method]] = {
    "sds": SDS,
    "nfsd": NFSD,
    "csd": CSD,
    "vsd": VSD,
    "sdi": SDI,
    "ism": ISM,
    "bridge": Bridge,
    "dds": DDS,
    "diffinstruct": DiffInstruct,
    "dmd": DMD,
    "dmd2": DMD2,
}
