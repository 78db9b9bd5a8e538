"""Commands about methods: list them, paint with them, compare them."""

from __future__ import annotations

from sds3d.cli.shared import Json, dump


def methods(json: Json = False) -> None:
    """List the distillation methods, what each needs, its settings and its paper.

    [bold]Example[/bold]

      sds3d methods
    """
    from dataclasses import fields

    from sds3d.distill import METHODS
    from sds3d.typed import plain

    rows = []
    for name, kind in METHODS.items():
        text, _, paper = (kind.__doc__ or "").partition("\n")[0].partition("arXiv ")
        settings = {f"method.{f.name}": plain(getattr(kind(), f.name)) for f in fields(kind)}
        title, paper = text.rpartition(" (")[0], paper.partition(",")[0].rstrip("):. ")
        rows.append({"name": name, "title": title, "paper": paper, "needs": list(kind.NEEDS), "settings": settings})
    if json:
        print(dump(rows))
        return
    for row in rows:
        needs = f"; needs a {', '.join(row['needs'])}" if row["needs"] else ""
        settings = " ".join(f"{key}={value}" for key, value in row["settings"].items())
        print(f"{row['name']:8s}{row['title']} (arXiv {row['paper']}){needs}\n        {settings}")
