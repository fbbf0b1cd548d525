// Pointwise convolution: the kernels of the table.
#pragma once

#include "pointwise_backward.h"
#include "pointwise_forward.h"
