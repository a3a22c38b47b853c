"""``SAEConfig``: what a dictionary reads, what it reconstructs and how it encodes, and the name that follows."""

import dataclasses

import jax.numpy as jnp

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.configs import LARGEST_SIZE, check_sizes, check_types
from bilinear_jax.nn.transformer import SITES
from weights_convert.names import ACTIVATIONS, SAEName, sae_folder_name

SAE_SITES = tuple(site for site in SITES if site not in ("scores", "pattern"))
"""The sites that an SAE can read: those with ``d_model`` coordinates."""

THRESHOLDED = ("batchtopk", "jumprelu", "relu")
"""The activations that compare each pre-activation with a threshold, so the number of active features varies."""

MAX_ACTIVE = 512
"""The default of ``SAEConfig.max_active``."""


def site_name(name: str) -> str:
    """The name of a site in this library's spelling. The given name may have hyphens or underscores.

    Raises:
        UnknownNameError: if no SAE can read the site.
    """
    site = name.replace("-", "_")
    if site not in SAE_SITES:
        raise UnknownNameError("site", repr(name), SAE_SITES, of="what an SAE can read")
    return site


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What a dictionary reads, reconstructs and how it encodes; hashable, so it can be a static argument of ``jit``.

    The formula is in the docstring of ``nn.sae``.
    """

    site: str  # where it reads: "mlp_in", "mlp_out", "resid_mid", ...
    layer: int  # the layer of that site, from 0
    d_model: int  # width of its input and of its reconstruction
    expansion: int | float  # features / d_model
    k: int | None = None  # active features: of each token (topk), on average (batchtopk, a target of jumprelu and relu)
    bilinear_encoder: bool = False  # pre-activations from (W_l x) * (W_r x) instead of W_enc x
    encoder_bias: bool = False  # add b_enc to W_enc x; of a bilinear encoder, to W_l x and W_r x
    passthrough: tuple[int, ...] = ()  # coordinates of x that are added to the reconstruction
    normalize: float | None = None  # a divisor; the published files record it but never apply it
    apply_normalize: bool = False  # True: encode x / normalize, and multiply the reconstruction by normalize
    tag: str | None = None  # distinguishes SAEs that agree in all else
    activation: str = "topk"  # "topk", "topk_relu", "batchtopk", "jumprelu" or "relu"
    target: str | None = None  # the site of the same layer that it reconstructs; None: its own. Else a transcoder
    skip: bool = False  # add W_skip x to the reconstruction
    centred: bool | None = None  # encode x - b_dec; None: an SAE does, a transcoder does not
    product_bias: bool = False  # of a bilinear encoder: add b_z to the products
    linear_term: bool = False  # of a bilinear encoder: add W x to the products
    max_active: int | None = None  # most active features of a token in sparse codes, unless top-k; None: 512, or all
    token_lookup: int | None = None  # add a row of W_lookup for each token to the reconstruction: number of token ids
    inputs: int | None = None  # of a readable one: encode the codes of this many input features of its site, not x
    inputs_k: int | None = None  # active input features of each token
    reads: int | None = None  # most input features that each factor of a product has a weight for

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "site", site_name(self.site))
        if self.target is not None:
            target = site_name(self.target)
            object.__setattr__(self, "target", None if target == self.site else target)
        if self.centred is None:
            object.__setattr__(self, "centred", self.target is None)
        if not 0 <= self.layer <= LARGEST_SIZE:
            raise ValueError(f"layer is {self.layer}, but layers are numbered from 0, up to {LARGEST_SIZE}")
        self._check_width()
        self._check_activation()
        self._check_parts()
        if self.tag is not None and (not self.tag or {*"/\\"} & {*self.tag} or not self.tag.isprintable()):
            raise ValueError(
                f"tag is {self.tag!r}, but it must be None or a part of a folder's name, without '/', a backslash and "
                "characters that cannot be printed"
            )
        single = jnp.finfo(jnp.float32)
        if self.normalize is not None and not abs(self.normalize) <= float(single.max):
            raise ValueError(f"normalize must be a finite number in float32, got {self.normalize}")
        if self.apply_normalize and not abs(self.normalize or 0) >= float(single.tiny):
            raise ValueError(
                f"normalize is {self.normalize}, but apply_normalize needs a number other than 0: give normalize"
            )

    def _check_width(self) -> None:
        check_sizes(self, "d_model")
        if not 0 < self.expansion <= LARGEST_SIZE:
            raise ValueError(f"expansion must be at least 1, got {self.expansion}: it is features / d_model")
        features = self.d_model * self.expansion
        if abs(features - round(features)) > 1e-6 * features:
            raise ValueError(
                f"expansion is {self.expansion}, which makes {features} features of d_model {self.d_model}: give "
                "features / d_model for a whole number of features"
            )
        if float(self.expansion).is_integer():
            object.__setattr__(self, "expansion", int(self.expansion))
        check_sizes(self, "n_features")

    def _check_activation(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UnknownNameError("activation", repr(self.activation), ACTIVATIONS, of="a dictionary")
        if self.k is None and self.activation not in ("jumprelu", "relu"):
            raise ValueError(f"k is None, but {self.activation} needs the number of active features: give k")
        for name in ("k", "max_active"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= self.n_features:
                raise ValueError(
                    f"{name} is {value}, but it must be between 1 and {self.n_features} (the number of features)"
                )

    def _check_parts(self) -> None:
        if len(set(self.passthrough)) < len(self.passthrough):
            raise ValueError(f"passthrough is {list(self.passthrough)}, but each coordinate can be named only once")
        outside = [dim for dim in self.passthrough if not 0 <= dim < self.d_model]
        if outside:
            raise ValueError(f"passthrough coordinates {outside} lie outside 0 ... {self.d_model - 1}")
        if self.token_lookup is not None:
            check_sizes(self, "token_lookup")
        for name in ("product_bias", "linear_term"):
            if getattr(self, name) and not self.bilinear_encoder:
                raise ValueError(f"{name} is true, but only a bilinear encoder has it: set bilinear_encoder too")
        self._check_inputs()
        for name in ("passthrough", "apply_normalize", "centred"):
            if getattr(self, name) and self.target is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but a transcoder ({self.site} to {self.target}) cannot have it: "
                    "what it reads and what it reconstructs are two sites"
                )

    def _check_inputs(self) -> None:
        given = {name: getattr(self, name) for name in ("inputs", "inputs_k", "reads")}
        if not any(value is not None for value in given.values()):
            return
        if self.inputs is None or self.inputs_k is None or self.reads is None:
            raise ValueError(f"a readable dictionary has inputs, inputs_k and reads, but got {given}: give all three")
        check_sizes(self, "inputs")
        if not self.bilinear_encoder or self.linear_term or self.target is None:
            raise ValueError(
                "inputs is set, but only a bilinear transcoder without a linear term reads codes: set bilinear_encoder "
                "and target"
            )
        for name in ("inputs_k", "reads"):
            if not 1 <= given[name] <= self.inputs:
                raise ValueError(f"{name} is {given[name]}, but it must be between 1 and {self.inputs} (inputs)")

    @property
    def width(self) -> int:
        """The numbers that each row of ``w_enc`` is multiplied with: ``d_model``, or the input features."""
        return self.inputs or self.d_model

    @property
    def n_features(self) -> int:
        return round(self.d_model * self.expansion)

    @property
    def scale(self) -> float:
        """``normalize`` if it is applied, else 1: the unit of the SAE's own space, in that of its site."""
        return self.normalize if self.apply_normalize and self.normalize else 1.0

    @property
    def reconstructs(self) -> str:
        """The site that it reconstructs: ``target``, or ``site`` if there is none."""
        return self.target or self.site

    @property
    def thresholded(self) -> bool:
        """Whether the number of active features varies from token to token."""
        return self.activation in THRESHOLDED

    @property
    def slots(self) -> int:
        """The number of codes of a token in ``SparseCodes``: k, or ``max_active`` of a thresholded activation."""
        if not self.thresholded:
            assert self.k is not None  # checked above
            return self.k
        return min(self.n_features, self.max_active or MAX_ACTIVE)

    @property
    def encoder_blocks(self) -> int:
        """How many rows of ``w_enc`` each feature has: 1; of a bilinear encoder 2, or 3 with ``linear_term``."""
        return 1 + self.bilinear_encoder + self.linear_term

    @property
    def name(self) -> str:
        """The folder name: ``<layer>-<site>-x<expansion>-k<k>[-<tag>]``, the site with hyphens, as published.

        A transcoder has ``<site>-to-<target>`` for its site. Instead of ``k<k>``, the other activations have
        ``reluk<k>``, ``batchk<k>``, ``jumprelu[<k>]`` and ``relu[<k>]``.

        Example:
            >>> SAEConfig("mlp_in", 2, 8, 4, 3, target="mlp_out", activation="batchtopk").name
            '2-mlp-in-to-mlp-out-x4-batchk3'
        """
        return sae_folder_name(
            SAEName(self.layer, self.site, self.expansion, self.k, self.tag, self.activation, self.target)
        )
