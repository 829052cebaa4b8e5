/* The 4-bit tables as 8-bit integers. */
#ifndef OM_LEVELS_H
#define OM_LEVELS_H

/* NF4: value = (level - zero) / unit; unit, zero and levels fitted to the 16 values by least squares, each weighted with the
 * code's frequency in normal weights: relative rms error 0.33%, against 0.59% with round(127 * value). */
#define OM_NF4_LEVELS -122, -84, -63, -47, -33, -21, -9, 2, 12, 22, 33, 44, 57, 72, 92, 126
#define OM_NF4_UNIT 124.11054821862581f
#define OM_NF4_ZERO 2.1604544224639f

/* MXFP4 (E2M1): twice the value is an integer. */
#define OM_MXFP4_LEVELS 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12
#define OM_MXFP4_UNIT 2.0f

#endif
