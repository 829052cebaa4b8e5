/* The lists of `api.h` as data: Python compares them with its own before it calls a function. */
#include "om_kernels.h"

typedef struct {
    const char *owner, *name; /* no name: the struct itself */
    const char *type;
    int64_t offset, num_bytes;
} abi_field;

typedef struct {
    const char *result, *name, *parameters;
} abi_function;

typedef struct {
    const char *name;
    int64_t value;
} abi_constant;

#define DESCRIBE_FIELD(T, type, name, dimension) {#T, #name, #type #dimension, offsetof(T, name), sizeof(((T *)0)->name)},
#define DESCRIBE_STRUCT(T, FIELDS) {#T, "", "", 0, sizeof(T)}, FIELDS(DESCRIBE_FIELD, T)
#define DESCRIBE_FUNCTION(result, name, parameters) {#result, #name, #parameters},
#define DESCRIBE_CONSTANT(name) {#name, name},

OM_EXPORT const int32_t om_abi_version = OM_ABI_VERSION;

/* Each ends with an entry of zeros. */
OM_EXPORT const abi_field om_abi_fields[] = {OM_STRUCTS(DESCRIBE_STRUCT){0}};
OM_EXPORT const abi_function om_abi_functions[] = {OM_FUNCTIONS(DESCRIBE_FUNCTION){0}};
OM_EXPORT const abi_constant om_abi_constants[] = {OM_CONSTANTS(DESCRIBE_CONSTANT){0}};
