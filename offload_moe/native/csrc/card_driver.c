/* Loads NVIDIA's driver, or a library with its functions, and says what kept it from working. */
#include "card_driver.h"
#include "platform.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const NAMES[] = {
#ifdef _WIN32
    "nvcuda.dll",
#else
    "libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", /* WSL2 has it where the loader does not always look */
#endif
};
enum { OLDEST_MAJOR = 12 }; /* its drivers have all functions of the table */

static void *load_first(const char *path, const char **name) {
    if (path != NULL) {
        *name = path;
        return om_load_library(path);
    }
    void *library = NULL;
    for (size_t n = 0; library == NULL && n < sizeof NAMES / sizeof *NAMES; n++) library = om_load_library(*name = NAMES[n]);
    if (library == NULL) *name = NAMES[0];
    return library;
}

/* Fill the table. Returns the first function that the library lacks, or NULL. */
static const char *fill(om_driver *driver, void *library) {
    void *found;
#define FILL(name, version, parameters) \
    found = om_library_symbol(library, #name #version); \
    if (found == NULL) return #name #version; \
    memcpy(&driver->name, &found, sizeof found);
    OM_DRIVER_FUNCTIONS(FILL)
#undef FILL
    found = om_library_symbol(library, "omHostAccess");
    memcpy(&driver->host_access, &found, sizeof found);
    return NULL;
}

/* Write what a code of the driver means. */
OM_EXPORT void om_driver_describe(const om_driver *driver, int32_t code, char *text, int64_t room) {
    const char *name = NULL, *words = NULL;
    if (driver->cuGetErrorName(code, &name) != OM_CU_OK || name == NULL) name = "an unknown error";
    if (driver->cuGetErrorString(code, &words) != OM_CU_OK) words = NULL;
    snprintf(text, (size_t)room, words != NULL ? "%s (%d: %s)" : "%s (%d)", name, code, words);
}

static int start(om_driver *driver, const char *name, char *reason, int64_t room) {
    char meaning[256];
    int version = 0, count = 0;
    int code = driver->cuInit(0);
    if (code == OM_CU_OK) code = driver->cuDriverGetVersion(&version);
    if (code == OM_CU_OK) code = driver->cuDeviceGetCount(&count);
    if (code == OM_CU_OK && count == 0) code = OM_CU_NO_CARD;
    if (code == OM_CU_OK) return 1;
    om_driver_describe(driver, code, meaning, sizeof meaning);
    snprintf(reason, (size_t)room, "%s does not start: %s", name, meaning);
    return 0;
}

/* Load the driver at `path`, or the system's for NULL, and start it. NULL: `reason` says why not. It stays loaded until the
 * process ends, as its threads and handlers do. */
OM_EXPORT om_driver *om_driver_open(const char *path, char *reason, int64_t room) {
    const char *name;
    void *library = load_first(path, &name);
    om_driver *driver = library == NULL ? NULL : calloc(1, sizeof *driver);
    if (driver == NULL) {
        snprintf(reason, (size_t)room, library == NULL ? "there is no %s" : "memory is short for %s", name);
        return NULL;
    }
    const char *missing = fill(driver, library);
    if (missing != NULL)
        snprintf(reason, (size_t)room, "%s has no %s: CUDA %d needs a newer driver (525 at least)", name, missing, OLDEST_MAJOR);
    else if (start(driver, name, reason, room)) return driver;
    free(driver);
    return NULL;
}

OM_EXPORT void om_driver_close(om_driver *driver) { free(driver); }

/* Whether every further call fails until the process ends: the card was reset (a kernel took too long), unplugged, or faulted. */
OM_EXPORT int om_driver_is_lost(int code) {
    /* deinitialized, unavailable, illegal address, timeout, faults of kernels, launch failure, unknown (a display driver's reset) */
    return code == 4 || code == 46 || code == 700 || code == 702 || (code >= 714 && code <= 719) || code == 999;
}

static int32_t attribute(const om_driver *driver, int device, int number) {
    int value = 0;
    return driver->cuDeviceGetAttribute(&value, number, device) == OM_CU_OK ? value : 0;
}

/* What card `number` is. Returns a code of the driver. */
OM_EXPORT int om_card_describe(const om_driver *driver, int number, om_card *card) {
    int device, code = driver->cuDeviceGet(&device, number);
    size_t num_bytes = 0;
    if (code != OM_CU_OK) return code;
    *card = (om_card){.device = device,
                      .major = attribute(driver, device, 75),
                      .minor = attribute(driver, device, 76),
                      .num_multiprocessors = attribute(driver, device, 16),
                      .core_khz = attribute(driver, device, 13),
                      .memory_khz = attribute(driver, device, 36),
                      .memory_bits = attribute(driver, device, 37),
                      .has_watchdog = attribute(driver, device, 17),
                      .is_integrated = attribute(driver, device, 18),
                      .maps_host_memory = attribute(driver, device, 19)};
    if ((code = driver->cuDeviceGetCount(&card->num_cards)) != OM_CU_OK) return code;
    if ((code = driver->cuDriverGetVersion(&card->driver_version)) != OM_CU_OK) return code;
    if ((code = driver->cuDeviceTotalMem(&num_bytes, device)) != OM_CU_OK) return code;
    card->num_bytes = (int64_t)num_bytes;
    return driver->cuDeviceGetName(card->name, sizeof card->name, device);
}
