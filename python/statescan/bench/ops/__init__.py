"""The operators of the suite, by name. A new one is a file here and a line below."""

import statescan
from statescan.bench.ops import (
    causal_conv1d,
    causal_conv1d_update,
    cross_merge,
    cross_scan,
    gated_rms_norm,
    mamba2_mixer,
    mamba2_step,
    materialize_mixer,
    route_gather,
    selective_scan,
    selective_scan_2d,
    selective_state_update,
    ssd_scan,
)
from statescan.bench.suite import Op

OPS: dict[str, Op] = {
    module.OP.name: module.OP
    for module in (
        selective_scan,
        ssd_scan,
        causal_conv1d,
        gated_rms_norm,
        mamba2_mixer,
        mamba2_step,
        materialize_mixer,
        selective_state_update,
        causal_conv1d_update,
        cross_scan,
        cross_merge,
        route_gather,
        selective_scan_2d,
    )
    if hasattr(statescan, module.OP.name)
}
