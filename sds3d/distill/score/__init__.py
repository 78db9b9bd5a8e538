"""Score-distillation methods, one file each. ``distill.core`` turns a method's direction into a gradient."""

from sds3d.distill.core import Method
from sds3d.distill.score.bridge import Bridge
from sds3d.distill.score.csd import CSD
from sds3d.distill.score.dds import DDS
from sds3d.distill.score.diffinstruct import DiffInstruct
from sds3d.distill.score.dmd import DMD
from sds3d.distill.score.dmd2 import DMD2
from sds3d.distill.score.ism import ISM
from sds3d.distill.score.nfsd import NFSD
from sds3d.distill.score.sdi import SDI
from sds3d.distill.score.sds import SDS
from sds3d.distill.score.vsd import VSD

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
