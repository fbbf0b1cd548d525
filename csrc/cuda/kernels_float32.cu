#define MBN_STORAGE float
#include "kernel_table.cuh"
