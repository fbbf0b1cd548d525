#define MBN_STORAGE float
#define MBN_NO_BLOCKS  // their products are of 16-bit numbers
#include "kernel_table.cuh"
