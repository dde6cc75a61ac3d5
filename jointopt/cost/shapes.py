"""Parameters, bytes, MACs and BOPs of any sub-network, from shapes alone: exact, and for many genomes at once.

Each module is a small table (see tables.py): what it costs at every choice of the genes that it depends on.

Attention computes its products of a whole text for all pairs of tokens, since transformers leaves out by a mask what
comes later or lies beyond a sliding window. One more token meets the tokens of its window alone, and transformers'
caches hold no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
from torch import Tensor, nn

from jointopt.batches import learned_positions
from jointopt.cost.operators import Answer, LatencyModel, Operator
from jointopt.cost.positions import Positions, kind_of
from jointopt.cost.tables import CostTables, Table
from jointopt.names import ADAPTERS, LEARNED_RANGES
from quant.cache import cache_format
from quant.errors import JointoptError
from quant.formats import Scheme, scheme
from quant.packing import constants_bytes, storage_bytes
from search_spaces.family import Cache, Family, Layer, Width, extent
from search_spaces.space import SearchSpace

_TRAINED_BESIDE = (LEARNED_RANGES, *ADAPTERS)
"""Parameters of training alone, which no checkpoint stores."""
MEASURES = ("parameters", "size", "macs", "bops")
CACHE_MEASURES = ("cache", "decode_macs")
"""Of models that generate text: bytes that a token takes in the cache of all layers while it is within their windows,
and MACs of one more token after a context of as many tokens as a sample of `positions` has."""
TIMED = ("latency", "energy", "activation")
"""Of a network whose operators a model of latency answers for: seconds and joules of a batch, and the bytes of the
largest operator's inputs and outputs."""
DECODED = ("decode_latency", "decode_energy", "cached")
"""The same for one more token of every sequence of a batch, after the whole context; and the bytes that are in a
sequence's caches then."""
Chosen = Mapping[int | None, int]
"""Gene -> index of its choice; None -> 0: what no gene chooses is the first of one."""


def cost_tables(
    model: nn.Module,
    family: Family,
    space: SearchSpace,
    positions: Positions,
    precision_gene: Mapping[str, str],
    schemes: Mapping[tuple[str, str], Scheme],
    leaving: Mapping[str, Sequence[str]],
    latency: LatencyModel | None,
) -> CostTables:
    """The costs of a super-network's sub-networks.

    Args:
        model: the super-network's prepared model.
        positions: see `measure_positions`; they give `macs` its meaning: those of one such sample.
        schemes: (layer's path, choice) -> the scheme as it fits the layer; what is not in it stays as it is.
        leaving: depth gene -> names of its removable blocks in the order of leaving.
        latency: what answers for time and energy; None leaves them out.

    Raises:
        JointoptError: a context of the model of latency for a model that reads no tokens, or not as many.
    """
    found = _Tabulation(model, family, space, positions, precision_gene, schemes, latency).tables()
    return CostTables(found, family, space, leaving, positions, latency)


class _Tabulation:
    """The tables of one super-network in the making."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        space: SearchSpace,
        positions: Positions,
        precision_gene: Mapping[str, str],
        schemes: Mapping[tuple[str, str], Scheme],
        latency: LatencyModel | None,
    ):
        self.model, self.family, self.space, self.latency = model, family, space, latency
        self.positions, self.once = positions.of, positions.once
        self._index = {name: i for i, name in enumerate(space.names)}
        self._precision_gene, self._fitted = precision_gene, schemes
        self._layers = {layer.path: layer for layer in family.layers}
        self._tied = {path: layer for layer in family.layers for path in layer.tied}
        self._producer = {part.module: (w, part.channels) for w in family.widths for part in w.producers}
        self._consumer = {part.module: (w, part.channels) for w in family.widths for part in w.consumers}
        self._attends = {w.consumers[0].module.rpartition(".")[0]: w for w in family.widths if w.attention}
        self._caches = {cache.attention: cache for cache in family.caches}
        self._seen: set[int] = set()
        self.measures = MEASURES + (CACHE_MEASURES if family.caches else ())
        if latency is not None:
            self.measures += TIMED + (DECODED if family.caches else ())
            self._tokens, self._scale = self._context(latency)

    def tables(self) -> list[Table]:
        found = [self._table(path, module) for path, module in self.model.named_modules() if _stores(module)]
        found += [self._attention(width) for width in self.family.widths if width.attention]
        return found + [self._cache(cache) for cache in self.family.caches]

    def _context(self, latency: LatencyModel) -> tuple[float, float]:
        """Tokens of a measured sample, and by how much the stated context is longer.

        Raises:
            JointoptError: a context for a model that reads no tokens, or not as many.
        """
        attention = next((width for width in self.family.widths if width.attention), None)
        tokens = self.positions.get(attention.consumers[0].module, 1.0) if attention else 1.0
        if latency.context is None:
            return tokens, 1.0
        given = self.family.example(self.model) if self.family.example else {}
        if "input_ids" not in given:
            raise JointoptError(
                f"context: found {latency.context}, and a {self.family.name} reads no tokens; allowed: none"
            )
        most = learned_positions(self.model)
        if most is not None and latency.context > most:
            raise JointoptError(f"context: found {latency.context}; the model takes {most} tokens at most")
        return tokens, latency.context / tokens

    def _sizes(self, found: tuple[Width, int] | None, full: int) -> tuple[int | None, tuple[int, ...]]:
        """The gene of a width, and the channels at each of its choices; None and the only number where none chooses."""
        if found is None or found[0].gene not in self._index:
            return None, (full,)
        width, channels = found
        gene = self._index[width.gene]
        return gene, tuple(int(choice) // width.unit * channels for choice in self.space.genes[gene].choices)

    def _table(self, path: str, module: nn.Module) -> Table:
        owned = self._owned(module)
        layer = self._layers.get(path) or self._tied.get(path)
        full_rows, full_columns = (extent(module, side) or 0 for side in ("rows", "columns"))
        row, rows = self._sizes(self._producer.get(path), full_rows)
        column, columns = self._heads_of(path, module) or self._sizes(self._consumer.get(path), full_columns)
        precision, schemes = self._schemes(layer)
        readers = [self._schemes(each) for each in self._readers(layer)]

        def cost(chosen: Chosen) -> dict[str, float]:
            read_in = {found[chosen[gene]] for gene, found in readers}
            reader = read_in.pop() if len(read_in) == 1 else None
            sizes = rows[chosen[row]], columns[chosen[column]]
            return self._module_cost(path, module, owned, *sizes, schemes[chosen[precision]], reader)

        return self._filled(path, kind_of(module) or "other", (row, column, precision, *(g for g, _ in readers)), cost)

    def _filled(
        self, path: str, kind: str, genes: Iterable[int | None], cost: Callable[[Chosen], Mapping[str, float]]
    ) -> Table:
        """The table of what `cost` says of every choice of the genes."""
        of = tuple(dict.fromkeys(gene for gene in genes if gene is not None))
        shape = [len(self.space.genes[gene].choices) for gene in of]
        whole = ("parameters", "size", "macs", "cache", "decode_macs", "cached")
        values = {m: np.zeros(shape, dtype=np.int64 if m in whole else np.float64) for m in self.measures}
        for at in np.ndindex(*shape):
            for measure, value in cost({None: 0, **dict(zip(of, at, strict=True))}).items():
                values[measure][at] = value
        return Table(path, kind, of, values)

    def _heads_of(self, path: str, module: nn.Module) -> tuple[int | None, tuple[int, ...]] | None:
        """The heads that a normalization within them meets at each token; None for all other modules. Only times depend
        on it."""
        width = self._attends.get(path.rpartition(".")[0])
        if self.latency is None or width is None or kind_of(module) != "norm" or path not in self.positions:
            return None
        heads = self.positions[path] / self._tokens
        if heads == 1 or heads not in (width.size, width.units):  # of queries, or of keys
            return None
        return self._sizes((width, int(heads) // width.units), int(heads))

    def _schemes(self, layer: Layer | None) -> tuple[int | None, list[Scheme | None]]:
        """A layer's precision gene, and the schemes of its choices; of one without: None, and a single scheme."""
        name = self._precision_gene.get(layer.path) if layer else None
        gene = self._index[name] if name else None
        choices = ("none",) if gene is None else self.space.genes[gene].choices
        if layer is None:
            return gene, [None for _ in choices]
        return gene, [self._fitted.get((layer.path, str(choice))) or scheme("none") for choice in choices]

    def _readers(self, layer: Layer | None) -> list[Layer]:
        """What alone reads a convolution. Only times depend on it."""
        paths = layer.readers if layer is not None and self.latency is not None else ()
        return [self._layers[path] for path in paths]

    def _owned(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores for this module; what another module stored already is left out."""
        found = {}
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if name in _TRAINED_BESIDE:
                    continue
                if tensor is None or id(tensor) in self._seen or name in module._non_persistent_buffers_set:
                    continue
                self._seen.add(id(tensor))
                found[name] = tensor
        return found

    def _module_cost(
        self,
        path: str,
        module: nn.Module,
        owned: Mapping[str, Tensor],
        rows: int,
        columns: int,
        scheme: Scheme | None,
        reader: Scheme | None,
    ) -> dict[str, float]:
        parameters = size = 0
        quantized = scheme is not None and scheme.weights is not None
        for name, tensor in owned.items():
            shape = _sliced_shape(module, name, tensor, rows, columns)
            if name in module._parameters:
                parameters += math.prod(shape)
            if name == "weight" and quantized:
                assert scheme is not None
                size += storage_bytes(scheme, shape, tensor.element_size(), embedding=isinstance(module, nn.Embedding))
            else:
                size += math.prod(shape) * tensor.element_size()
        if "weight" not in owned and scheme is not None and not isinstance(module, nn.Embedding):
            size += constants_bytes(scheme)  # those beside a weight of its own are among its bytes
        macs = 0.0
        weight = module._parameters.get("weight")
        bits = 0 if weight is None else weight.element_size() * 8
        if path in self.positions and columns and weight is not None and weight.dim() > 1:
            macs = self.positions[path] * rows * columns * weight[0, 0].numel()
        weight_bits = scheme.weights.bits if scheme and scheme.weights else bits
        input_bits = scheme.activations.bits if scheme and scheme.activations else bits
        cost = {"parameters": parameters, "size": size, "macs": round(macs), "bops": macs * weight_bits * input_bits}
        if self.family.caches:
            cost["decode_macs"] = rows * columns if macs else 0
        if self.latency is not None and (kind := kind_of(module)) is not None and path in self.positions:
            operator = self._operator(kind, path, module, rows, columns, scheme)
            cost |= self._timed(replace(operator, reader=reader))
        return cost

    def _operator(
        self, kind: str, path: str, module: nn.Module, rows: int, columns: int, scheme: Scheme | None
    ) -> Operator:
        weight = getattr(module, "weight", None)
        if weight is None:  # a normalization whose scale has another name
            weight = next(chain(module.parameters(recurse=False), module.buffers(recurse=False)))
        shape = _sliced_shape(module, "weight", weight, rows, columns)
        if scheme is not None and scheme.weights is not None:
            stored = storage_bytes(scheme, shape, weight.element_size(), embedding=kind == "embedding")
        else:
            stored = math.prod(shape) * weight.element_size()
        positions = self.positions[path]
        if kind == "norm":
            positions = self._tokens * columns if columns else positions  # columns are the heads that it meets
            rows = columns = rows or weight.shape[0]
        return Operator(
            kind,
            rows,
            0 if kind == "embedding" else columns,
            positions * self._scale if self._by_token(positions) else positions,
            area=weight[0, 0].numel() if kind == "conv" else 1,
            stride=math.prod(module.stride) if isinstance(module, nn.Conv2d) else 1,
            heads=module.groups if isinstance(module, nn.Conv2d) else 1,
            scheme=scheme if scheme is not None and scheme.weights is not None else None,
            weight_bytes=stored,
            bits=weight.element_size() * 8,
            reduces=path in self._consumer and self._consumer[path][0].block is not None,
            once=path in self.once,
        )

    def _by_token(self, positions: float) -> bool:
        """Whether a measured sample's positions are its tokens, or some of each: its heads, for a norm within them."""
        per_token = positions / self._tokens
        return per_token >= 1 and abs(per_token - round(per_token)) < 1e-6

    def _timed(self, operator: Operator, met: float = 0.0) -> dict[str, float]:
        """What an operator takes: of the whole context and, where there is a cache, of one more token, which meets so
        many keys. Reading those of earlier tokens is what `_cache` counts."""
        assert self.latency is not None
        answer = self.latency.answer(operator)
        moved = (operator.input_bytes + operator.output_bytes) * operator.samples(self.latency.batch)
        found = {"latency": answer.seconds, "energy": answer.joules, "activation": moved}
        if self.family.caches:
            one = replace(operator, context=met, cache_bytes=0.0)
            if self._by_token(operator.positions / self._scale):
                one = replace(one, positions=operator.positions / (self._tokens * self._scale))
            answer = self.latency.answer(one)
            found |= {"decode_latency": answer.seconds, "decode_energy": answer.joules}
        return found

    def _attention(self, width: Width) -> Table:
        """The two products of attention: queries with keys, and what they weigh of the values, each T x T x width; for
        one more token as many times the width as it meets keys, its own among them."""
        part = width.consumers[0]
        gene, rows = self._sizes((width, part.channels), width.units * part.channels)
        tokens = self.positions.get(part.module, 0.0)
        weight = self.model.get_submodule(part.module).get_parameter("weight")
        bits = weight.element_size() * 8

        def cost(chosen: Chosen) -> dict[str, float]:
            products = 2 * rows[chosen[gene]]  # of a query with one key
            macs = products * tokens * tokens
            found = {"macs": round(macs), "bops": macs * bits * bits}
            if self.family.caches:
                found["decode_macs"] = round(products * self._met(width, tokens)) if tokens else 0
            if self.latency is not None:
                found |= self._time_attention(width, rows[chosen[gene]], tokens * self._scale, bits)
            return found

        return self._filled(part.module, "attention", (gene,), cost)

    def _met(self, width: Width, tokens: float) -> float:
        """Keys that a token's attention meets after so many others."""
        cache = self._caches.get(width.consumers[0].module.rpartition(".")[0])
        return (tokens if cache is None else cache.held(tokens)) + 1

    def _time_attention(self, width: Width, row: int, tokens: float, bits: int) -> dict[str, float]:
        """Keys and values are as wide as the narrowest producer of the width says: there may be fewer heads of them."""
        channels = [part.channels for part in width.producers]
        keys = round(row * (min(channels) / max(channels)))
        read = 2 * keys * tokens * bits / 8
        heads = row // min(channels)
        operator = Operator("attention", row, keys, tokens, tokens, heads=heads, bits=bits, cache_bytes=read)
        return self._timed(operator, self._met(width, tokens))

    def _cache(self, cache: Cache) -> Table:
        """What the cache of one attention layer takes, what reading it does for one more token, and what computing keys
        and values from cached inputs does."""
        keys = f"{cache.attention}.k_proj"
        weight = self.model.get_submodule(keys).get_parameter("weight")
        (gene, rows), hidden = self._sizes(self._producer.get(keys), weight.shape[0]), weight.shape[1]
        head_dim = self._producer[keys][1]
        precision = self._index.get(cache.name)
        choices = self.space.genes[precision].choices if precision is not None else ("none",)

        def cost(chosen: Chosen) -> dict[str, float]:
            row, form = rows[chosen[gene]], cache_format(str(choices[chosen[precision]]))
            token = form.token_bytes(row // head_dim, head_dim, hidden, weight.element_size())
            found: dict[str, float] = {"size": form.constant_bytes(row // head_dim, head_dim), "cache": token}
            if self.latency is not None:
                held = cache.held(self._tokens * self._scale)
                found["cached"] = token * round(held)
                answer = self.latency.answer(Operator("cache", 0, 0, 0.0, cache_bytes=token * held))
                again = self._computed_again(row, hidden, held, 8 * weight.element_size()) if form.inputs else None
                for measure, part in (("decode_latency", "seconds"), ("decode_energy", "joules")):
                    computed = 2 * getattr(again, part) if again else 0.0  # keys and values
                    found[measure] = getattr(answer, part) + computed
            if form.inputs:
                found["decode_macs"] = round(cache.held(self.positions.get(keys, 0.0))) * 2 * row * hidden
            return found

        return self._filled(keys, "cache", (gene, precision), cost)

    def _computed_again(self, rows: int, hidden: int, tokens: float, bits: int) -> Answer:
        """What the keys of so many tokens take, or the values, from inputs that are cached; the weights that they are
        computed by are read for the new token anyway."""
        assert self.latency is not None
        return self.latency.answer(Operator("linear", rows, hidden, tokens, bits=bits))


def _stores(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None for tensor in tensors)


def _sliced_shape(module: nn.Module, name: str, tensor: Tensor, rows: int, columns: int) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if isinstance(module, nn.Embedding):
        return (shape[0], rows)
    if not shape or shape[0] != extent(module, "rows"):
        return tuple(shape)
    shape[0] = rows
    if name == "weight" and len(shape) > 1:
        shape[1] = columns
    return tuple(shape)
