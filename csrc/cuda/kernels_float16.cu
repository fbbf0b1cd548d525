#define MBN_STORAGE float16
#include "kernel_table.cuh"
