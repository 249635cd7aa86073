"""What is in an image: a manifest of packages for people and programs, and an SPDX bill of materials."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.image.recipe import Recipe

_FORMAT = "${Package}\t${Version}\t${Architecture}\t${source:Package}\n"


def write(root: Path, recipe: Recipe, flavour: str, folder: Path) -> None:
    """Write manifest.json and sbom.spdx.json (SPDX 2.3) of the unpacked image ``root`` into ``folder``."""
    listing = subprocess.run(["chroot", root, "dpkg-query", "-W", "-f", _FORMAT],
                             capture_output=True, text=True, check=True).stdout  # fmt: skip
    fields = ("name", "version", "architecture", "source")
    packages = [dict(zip(fields, line.split("\t"), strict=True)) for line in sorted(listing.splitlines())]
    about = {"image": recipe.name, "flavour": flavour, "suite": recipe.suite, "packages": packages}
    (folder / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "sbom.spdx.json").write_text(json.dumps(_spdx(recipe, flavour, packages), indent=1) + "\n")


def _spdx(recipe: Recipe, flavour: str, packages: list[dict[str, str]]) -> dict[str, object]:
    name = f"rackless-{recipe.name}-{flavour}"
    described = [
        {
            "SPDXID": f"SPDXRef-{number}",
            "name": package["name"],
            "versionInfo": package["version"],
            "supplier": "Organization: Debian",
            "downloadLocation": "NOASSERTION",
            "licenseConcluded": "NOASSERTION",
            "externalRefs": [
                {
                    "referenceCategory": "PACKAGE-MANAGER",
                    "referenceType": "purl",
                    "referenceLocator": f"pkg:deb/debian/{package['name']}@{package['version']}"
                    f"?arch={package['architecture']}&distro={recipe.suite}",
                }
            ],
        }
        for number, package in enumerate(packages)
    ]
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": name,
        "documentNamespace": f"urn:rackless:{name}",
        "creationInfo": {
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": ["Tool: rackless"],
        },
        "packages": described,
        "relationships": [
            {
                "spdxElementId": "SPDXRef-DOCUMENT",
                "relationshipType": "DESCRIBES",
                "relatedSpdxElement": p["SPDXID"],
            }
            for p in described
        ],
    }
