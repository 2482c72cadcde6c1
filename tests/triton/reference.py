"""The references, over dense blocks as they are on GPUs: the form is said here and nowhere else."""

from functools import partial

from tests.kernels import helpers
from think_vllm.kernels.reference import attention, compaction, eviction, scoring
from think_vllm.plan.layout import BlockForm

FORM = BlockForm.GPU

make_case = partial(helpers.make_case, form=FORM)
make_layers = partial(helpers.make_layers, form=FORM)
split_dense = partial(compaction.split_dense, form=FORM)
dense_tokens = partial(compaction.dense_tokens, form=FORM)
compact_spans_ref = partial(compaction.compact_spans_ref, form=FORM)
gather_context = partial(attention.gather_context, form=FORM)
decode_attention_ref = partial(attention.decode_attention_ref, form=FORM)
key_energy_ref = partial(scoring.key_energy_ref, form=FORM)
gather_tokens_ref = partial(eviction.gather_tokens_ref, form=FORM)
