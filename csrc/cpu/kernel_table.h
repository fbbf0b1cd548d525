// Fills the table of kernels for the instruction set that the including file has chosen.
#pragma once

#include "depthwise.h"
#include "elementwise.h"
#include "evaluate.h"
#include "kernels.h"
#include "peak.h"
#include "pointwise.h"

#define MBN_EVALUATION_OF(S)                                                                                                         \
  {                                                                                                                                  \
    MBN_ISA::evaluate<S>, MBN_ISA::packed_pointwise_size<S>, MBN_ISA::packed_depthwise_size<S>, MBN_ISA::pack_pointwise<S>,          \
        MBN_ISA::pack_depthwise<S>, MBN_ISA::pack_wide<S>, MBN_ISA::padded_channels<S>, MBN_ISA::dense_channels<S>                   \
  }
#define MBN_TABLE_OF(S)                                                                                                              \
  {                                                                                                                                  \
    MBN_ISA::pointwise_forward<S>, MBN_ISA::pointwise_backward<S>, MBN_ISA::depthwise_forward<S>, MBN_ISA::depthwise_backward<S>,    \
        MBN_ISA::pool<S>, MBN_ISA::materialize<S>, MBN_ISA::materialize_gradient<S>, MBN_ISA::reduce_gradient<S>,                    \
        MBN_ISA::statistics<S>, MBN_EVALUATION_OF(S)                                                                                 \
  }
