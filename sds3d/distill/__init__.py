"""Score distillation: ``core`` turns a method's direction into a gradient; each method is a file, listed here."""

from sds3d.distill.sds import SDS

METHODS = {"sds": SDS}
