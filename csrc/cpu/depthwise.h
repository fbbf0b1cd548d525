// The depthwise kernels.
#pragma once

#include "depthwise_backward.h"
#include "depthwise_forward.h"
