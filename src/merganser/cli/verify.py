"""``merganser verify``, ``reproduce`` and ``sign``: whether a merge is what it says, and who made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from merganser.cli.common import tell, warn
from merganser.errors import UserError

_PROVENANCE = "provenance.json"
_SAMPLE = "32"  # steps that --deep merges again where it is not said how many


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path), metavar="DIR|STATISTICS", required=False)
@click.option(
    "--deep",
    is_flag=False,
    flag_value=_SAMPLE,
    metavar="[N|all]",
    help="Merge so many steps again, drawn at random, and compare.  [of --deep alone: 32]",
)
@click.option("--key", type=click.Path(path_type=Path), metavar="PUBLIC", help="It is to be signed by this key.")
@click.option("--seed", type=click.IntRange(0), help="Of the sample; by default another one each time.")
@click.option("--allow-rounding", is_flag=True, help="With --deep: let be what another kind of processor rounds.")
@click.option("--allow-pickle", is_flag=True, help="Accept parents in pytorch_model.bin (weights_only).")
@click.option("--threads", type=click.IntRange(1), help="With --deep: steps worked on at once.  [default: all cores]")
@click.option("--max-memory", metavar="SIZE", help="With --deep: what the process may take, such as 2GB.")
def verify_command(path: Path | None, deep: str | None, key: Path | None, seed: int | None, **settings: Any) -> None:
    """Check a merged folder, and its parents where they can be had, against its provenance.

    \b
    merganser verify merged
    merganser verify merged --deep all
    merganser verify merged --key owner.key.pub
    merganser verify merge_statistics.safetensors --key owner.key.pub

    With --key, the signature beside the provenance, or of a file or folder that has none, is checked as well.
    """
    if path is None and deep is not None and _steps(deep) is None:  # --deep has taken the folder for its number
        path, deep = Path(deep), _SAMPLE
    if path is None:
        raise click.UsageError("what is to be checked? Give a merged folder")
    if deep is not None and _steps(deep) is None:
        raise click.BadParameter(f"{deep!r} is neither a number of steps nor all", param_hint="--deep")
    from merganser.signing import check_signature, signature_of

    if key is not None:
        check_signature(path, key)
        tell(f"{path}: signed by {key}, and nothing was changed since")
        if deep is None and not (path / _PROVENANCE).is_file():
            return
    elif path.is_file():
        raise UserError(
            "only its signature can be checked", where=path, mend="give --key; or merganser inspect --validate"
        )
    elif signature_of(path).is_file():
        warn("it is signed; by whom is not checked without --key")
    from merganser.merging import verify

    result = verify(path, deep=None if deep is None else _steps(deep), seed=seed, **settings)
    for reason in result.absent:
        warn(f"not checked, because it cannot be had here: {reason}")
    for note in result.notes:
        warn(note)
    line = f"{result.files} files and {result.parents} parents are as recorded"
    if result.tensors:
        line += f"; {result.tensors} tensors merged again are the same"
        line += "" if result.seed is None else f" (sample --seed {result.seed})"
    tell(f"{path}: {line}")


def _steps(deep: str) -> int | Literal["all"] | None:
    """The value of --deep; None where it is none."""
    if deep == "all":
        return "all"
    return int(deep) if deep.isascii() and deep.isdigit() and len(deep) < 10 and int(deep) else None


@click.command("reproduce")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the repetition here.")
@click.option("--allow-pickle", is_flag=True, help="Accept parents in pytorch_model.bin (weights_only).")
def reproduce_command(folder: Path, output: Path | None, allow_pickle: bool) -> None:
    """Repeat a merge from its provenance and compare byte for byte."""
    from merganser.merging import reproduce

    differing = reproduce(folder, output, allow_pickle=allow_pickle)
    if differing:
        mend = "compare the versions in provenance.json with those installed here, and run 'merganser verify'"
        raise UserError(f"the repetition differs in {', '.join(differing)}", where=folder, mend=mend)
    click.echo(f"{folder}: repeated, every byte the same")


@click.command("sign")
@click.argument("path", type=click.Path(path_type=Path), metavar="DIR|FILE", required=False)
@click.option("--key", type=click.Path(path_type=Path), metavar="PRIVATE", help="The key to sign with, a PEM file.")
@click.option("--new-key", type=click.Path(path_type=Path), metavar="FILE", help="Make a pair of keys instead.")
def sign_command(path: Path | None, key: Path | None, new_key: Path | None) -> None:
    """Sign a merge, a checkpoint or a statistics file, so that others can check who made it.

    \b
    merganser sign --new-key my.key          # once: my.key stays with you, my.key.pub is for everybody
    merganser sign merged --key my.key       # writes merged/model.sig
    merganser sign merge_statistics.safetensors --key my.key

    Every file of a folder is signed, the card too: edit it before. The signature is one of OpenSSF Model Signing.
    """
    from merganser import signing

    if new_key is not None and path is None and key is None:
        private, public = signing.new_key(new_key)
        warn(f"keep {private} to yourself, and tell others {public} in a way that they trust")
        tell(str(public))
        return
    if path is None or key is None or new_key is not None:
        raise click.UsageError("give what is to be signed and --key PRIVATE; or --new-key FILE alone")
    password = None
    if signing.has_password(key):
        password = click.prompt(f"password of {key}", hide_input=True, err=True).encode()
    tell(str(signing.sign(path, key, password=password)))
