"""``bilinear-jax upload``: upload a model or dictionaries to the hub."""

import argparse
from typing import Any

from bilinear_jax.commands import common

HELP = "upload a model or dictionaries to the hub, with a card"
EXAMPLES = """examples:
  bilinear-jax upload runs/mine/model someone/mine --private
      log in first, with hf auth login; then bilinear_jax.load("someone/mine")
  bilinear-jax upload saes someone/mine-scope --license mit
      a folder of SAEs, or what bilinear-jax export wrote
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=common.folder, help="the folder of a model or of dictionaries")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository on the hub; it is made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", metavar="ID", help="the license in the card, such as mit (default: unknown)")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from bilinear_jax.store.upload import upload

    url = upload(options.folder, options.repo, private=options.private, license=options.license)
    return {"folder": str(options.folder), "url": url}


def text(result: dict[str, Any]) -> str:
    return f"{result['folder']}: {result['url']}"
