"""The names that peers have for where a dictionary reads, as a site and a layer of this library, and back."""

import re
from typing import Any

from weights_convert.sae import SITES

_LENS = {
    **{f"hook_{site}": site for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{"ln2.hook_normalized": "mlp_in", "mlp.hook_in": "mlp_in", "mlp.hook_out": "mlp_out"},
}
"""The hooks of TransformerLens in ``blocks.<layer>``."""

_MODULES = {
    None: ("resid_pre", "resid_post"),
    "mlp": ("mlp_in", "mlp_out"),
    "self_attn": (None, "attn_out"),
    "attn": (None, "attn_out"),
    "attention": (None, "attn_out"),
}
"""The modules of a layer in Hugging Face models: the sites of their input and of their output."""

_LENS_PATTERN = re.compile(r"blocks\.(\d{1,9})\.(.+)")
_MODULE_PATTERN = re.compile(
    r"(?:\w+\.)*?(?:layers|h)\.(\d{1,9})(?:\.(mlp|self_attn|attn|attention))?(\.input|\.output)?"
)
_SUBMODULE_PATTERN = re.compile(
    r"(resid_pre|resid_mid|resid_post|resid_out|mlp_in|mlp_out|attn_out)(?:_layer_?(\d{1,9}))?"
)

MAPPED = (
    "blocks.2.hook_resid_pre (or resid_mid, resid_post, attn_out, mlp_out), blocks.2.ln2.hook_normalized (mlp_in), "
    "blocks.2.mlp.hook_in, model.layers.2 (resid_post), model.layers.2.mlp (mlp_out), model.layers.2.self_attn"
)
"""The hooks with a site, for messages."""


def site_of(hook: str) -> tuple[str, int] | None:
    """The site and the layer of a hook of TransformerLens or of the output of a Hugging Face module. None: it has none.

    Example:
        >>> site_of("blocks.2.ln2.hook_normalized"), site_of("model.layers.10.mlp"), site_of("blocks.2.attn.hook_z")
        (('mlp_in', 2), ('mlp_out', 10), None)
    """
    if match := _LENS_PATTERN.fullmatch(hook):
        site = _LENS.get(match[2])
        return (site, int(match[1])) if site else None
    if match := _MODULE_PATTERN.fullmatch(hook):
        site = _MODULES[match[2]][match[3] != ".input"]
        return (site, int(match[1])) if site else None
    return None


def ends_of(module: str) -> tuple[str | None, str, int] | None:
    """The sites of the input and of the output of a Hugging Face module, and its layer. None: it is no such module.

    Example:
        >>> ends_of("layers.10.mlp")
        ('mlp_in', 'mlp_out', 10)
    """
    match = _MODULE_PATTERN.fullmatch(module)
    return (*_MODULES[match[2]], int(match[1])) if match and not match[3] else None


def site_of_submodule(name: str) -> tuple[str, int | None] | None:
    """The site and the layer in a name such as ``resid_post_layer_2``. None: there is no site in it.

    Example:
        >>> site_of_submodule("resid_post_layer_2"), site_of_submodule("mlp_out")
        (('resid_post', 2), ('mlp_out', None))
    """
    match = _SUBMODULE_PATTERN.fullmatch(name)
    return (match[1].replace("resid_out", "resid_post"), int(match[2]) if match[2] else None) if match else None


def hook_name(site: str, layer: int) -> str:
    """The hook of TransformerLens at a site.

    Example:
        >>> hook_name("mlp_out", 2), hook_name("mlp_in", 2)
        ('blocks.2.hook_mlp_out', 'blocks.2.ln2.hook_normalized')
    """
    return f"blocks.{layer}.{'ln2.hook_normalized' if site == 'mlp_in' else f'hook_{site}'}"


def placed(
    where: Any, hook: str | None, found: tuple[str | None, int | None] | None, site: str | None, layer: int | None
) -> tuple[str, int]:
    """The site and the layer of a dictionary: what its file says, and what the caller gave for what it does not say.

    Args:
        where: the file, for messages.
        hook: the text in the file that says it. None: there is none.
        found: what that text means. None, or None in it: not known.
        site: what the caller gave, and ``layer`` too. None: nothing.

    Raises:
        ValueError: if the two contradict each other, or if neither says it.
    """
    said_site, said_layer = found or (None, None)
    check_given(site, layer)
    check_given(said_site, said_layer)
    for name, given, said in (("site", site, said_site), ("layer", layer, said_layer)):
        if given is not None and said is not None and given != said:
            raise ValueError(
                f"{where} has {hook!r}, which is {name} {said!r}, but {name}={given!r} was given: leave out {name}="
            )
    site, layer = said_site or site, said_layer if said_layer is not None else layer
    if site is None or layer is None:
        said = f"has the hook {hook!r}, which does not say both site and layer" if hook else "names no hook"
        raise ValueError(f"{where} {said}: pass site= and layer=. Hooks that are known: {MAPPED}")
    return site, layer


def aimed(
    where: Any, hook: str | None, found: tuple[str, int] | None, place: tuple[str, int], target: str | None
) -> str | None:
    """The target of a transcoder, from the hook in its file, from the caller, or the usual one. None: its own site.

    Raises:
        ValueError: if the hook contradicts what the caller gave, is in another layer, or if nothing says the target.
    """
    site, layer = place
    check_given(target, None, "target")
    if found and found[1] != layer:
        raise ValueError(
            f"{where} reads layer {layer} but its target {hook!r} is in layer {found[1]}: transcoders across layers "
            "cannot be read"
        )
    if found and target not in (None, found[0]):
        raise ValueError(
            f"{where} has the target {hook!r}, which is {found[0]!r}, but target={target!r} was given: leave out "
            "target="
        )
    target = found[0] if found else target or ("mlp_out" if site == "mlp_in" else None)
    if target is None:
        said = f"has the target {hook!r}, which is not known" if hook else "names no target"
        raise ValueError(f"{where} is a transcoder and {said}: pass target=, one of {', '.join(SITES)}")
    return None if target == site else target


def own(where: Any, place: tuple[str, int], target: str | None) -> None:
    """Raise ``ValueError`` if the caller gave a target for a file that holds an SAE."""
    if target not in (None, place[0]):
        raise ValueError(
            f"{where} holds an SAE, which reconstructs its own site {place[0]!r}, but target={target!r} was given: "
            "leave out target="
        )


def check_given(site: str | None, layer: int | None, name: str = "site") -> None:
    """Raise ``ValueError`` for a site or a layer that there is not."""
    if site is not None and site not in SITES:
        raise ValueError(f"{name}={site!r} is not a site: give one of {', '.join(SITES)}")
    if layer is not None and (type(layer) is not int or layer < 0):
        raise ValueError(f"layer={layer!r} must be a whole number of at least 0")
