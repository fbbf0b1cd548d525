#define MBN_STORAGE bfloat16
#include "kernel_table.cuh"
