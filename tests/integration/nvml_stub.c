/* A libnvidia-ml.so.1 for tests: two H100s with the answers that one gave, idle.
 *
 * The first GPU can be divided into MIG instances. What each function answers can be changed by
 * the stub_* functions at the end, from the process that has it loaded. Structures as in nvml.h.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7 };
enum { GPUS = 2, PARTS = 2, DEVICES = GPUS + PARTS, RULES = 512, NAME = 64 };
#define EVERY (-1)
#ifndef MIG
#define MIG 0
#endif

typedef struct {
    const char *uuid, *name, *serial;
    int parent; /* -1: a whole GPU */
    unsigned gpu, memory, temperature, sm, mem_clock;
    unsigned long long total, used, reserved, energy, tx, rx, reasons, ecc[2];
    unsigned power, limit, remapped[4];
    unsigned long long process_memory; /* of this process; 0: it is not listed */
} device_t;

static device_t devices[DEVICES] = {
    {"GPU-11111111-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3", "1650000000001", -1, 0, 0,
     37, 915, 2619, 85520809984ull, 0, 503316480ull, 2121748, 780000, 619000, 1, {0, 0}, 97419,
     700000, {0, 0, 0, 0}, 0},
    {"GPU-22222222-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3", "1650000000002", -1, 100,
     33, 57, 1350, 2619, 85520809984ull, 42760404992ull, 503316480ull, 8295448, 4096, 8192, 4,
     {3, 1}, 696581, 700000, {2, 1, 0, 0}, 1073741824ull},
    {"MIG-33333333-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "", 0, 0, 0,
     0, 0, 0, 10200547328ull, 15728640ull, 0, 0, 0, 0, 0, {0, 0}, 0, 0, {0, 0, 0, 0}, 0},
    {"MIG-44444444-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3 MIG 2g.20gb", "", 0, 0, 0,
     0, 0, 0, 20937965568ull, 0, 0, 0, 0, 0, 0, {0, 0}, 0, 0, {0, 0, 0, 0}, 0},
};

static struct { char function[NAME]; int device, code; unsigned calls; } rules[RULES];
static int rule_count, mig = MIG, present[DEVICES] = {1, 1, 1, 1}, references, field_type = 3;
static pid_t owner;
static unsigned listed_pid; /* as which this process is listed; 0: as itself */
static char hanging[NAME];
static int hanging_device = EVERY;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;

/* A full table would answer wrongly without a word. */
static int new_rule(const char *function, int device) {
    if (rule_count == RULES) {
        fprintf(stderr, "nvml_stub: more than %d rules\n", RULES);
        abort();
    }
    snprintf(rules[rule_count].function, NAME, "%s", function);
    rules[rule_count].device = device;
    return rule_count++;
}

/* Counts the call, hangs if it is to, and returns what it is to answer. */
static int enter(const char *function, int device) {
    int code = SUCCESS, own = 0;
    pthread_mutex_lock(&lock);
    while (!strcmp(hanging, function) && (hanging_device == EVERY || hanging_device == device))
        pthread_cond_wait(&released, &lock);
    for (int i = 0; i < rule_count; i++) {
        if (strcmp(rules[i].function, function) && strcmp(rules[i].function, "*")) continue;
        if (rules[i].device == device) {
            rules[i].calls++;
            own |= !strcmp(rules[i].function, function);
            if (rules[i].code) code = rules[i].code;
        } else if (rules[i].device == EVERY && rules[i].code) code = rules[i].code;
    }
    if (!own) rules[new_rule(function, device)].calls = 1;
    pthread_mutex_unlock(&lock);
    if (code) return code;
    /* As the real one: what was opened in the parent of a fork is not open in the child. */
    if (strcmp(function, "nvmlInitWithFlags") && (!references || owner != getpid()))
        return UNINITIALIZED;
    return SUCCESS;
}

#define ENTER(device) do { int c = enter(__func__, device); if (c) return c; } while (0)
#define INDEX(handle) ((int)((device_t *)(handle) - devices))
#define DEVICE_CALL(handle) \
    device_t *d = handle; \
    if (d < devices || d >= devices + DEVICES) return INVALID_ARGUMENT; \
    ENTER(INDEX(d))
#define WHOLE_GPU_CALL(handle) \
    DEVICE_CALL(handle); \
    if (d->parent >= 0) return NOT_SUPPORTED

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    ENTER(EVERY);
    if (owner != getpid()) references = 0;
    owner = getpid();
    references++;
    return SUCCESS;
}

int nvmlShutdown(void) {
    ENTER(EVERY);
    references--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) { (void)code; return "an error of the stub"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    ENTER(EVERY);
    snprintf(version, length, "580.159.04");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER(EVERY);
    *count = 0;
    for (int i = 0; i < GPUS; i++) *count += present[i];
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    for (int i = 0; i < GPUS; i++)
        if (present[i] && index-- == 0) {
            ENTER(i);
            *handle = &devices[i];
            return SUCCESS;
        }
    return INVALID_ARGUMENT;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned length) {
    DEVICE_CALL(handle);
    snprintf(text, length, "%s", d->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned length) {
    DEVICE_CALL(handle);
    snprintf(text, length, "%s", d->name);
    return SUCCESS;
}

int nvmlDeviceGetSerial(void *handle, char *text, unsigned length) {
    WHOLE_GPU_CALL(handle);
    snprintf(text, length, "%s", d->serial);
    return SUCCESS;
}

int nvmlDeviceGetVbiosVersion(void *handle, char *text, unsigned length) {
    WHOLE_GPU_CALL(handle);
    snprintf(text, length, "96.00.74.00.01");
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    WHOLE_GPU_CALL(handle);
    *current = *pending = d == devices ? mig : 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) {
    WHOLE_GPU_CALL(handle);
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **part) {
    WHOLE_GPU_CALL(handle);
    /* Instances 0 and 2: there are gaps. */
    if (!mig || index % 2 || index / 2 >= PARTS || !present[GPUS + index / 2]) return NOT_FOUND;
    ENTER(GPUS + (int)index / 2);
    *part = &devices[GPUS + index / 2];
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    WHOLE_GPU_CALL(handle);
    if (mig && d == devices) return NOT_SUPPORTED;
    rates[0] = d->gpu;
    rates[1] = d->memory;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *info) {
    DEVICE_CALL(handle);
    info[0] = d->total;
    info[1] = d->total - d->used - d->reserved;
    info[2] = d->used + d->reserved;
    return SUCCESS;
}

#ifndef OLD_DRIVER
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;

int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2_t *info) {
    DEVICE_CALL(handle);
    info->total = d->total;
    info->reserved = d->reserved;
    info->free = d->total - d->used - d->reserved;
    info->used = d->used;
    return SUCCESS;
}

typedef struct { unsigned version, sensor; int temperature; } temperature_t;

int nvmlDeviceGetTemperatureV(void *handle, temperature_t *asked) {
    WHOLE_GPU_CALL(handle);
    asked->temperature = (int)d->temperature;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons) {
    WHOLE_GPU_CALL(handle);
    *reasons = d->reasons;
    return SUCCESS;
}
#endif

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees) {
    WHOLE_GPU_CALL(handle);
    (void)sensor;
    *degrees = d->temperature;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
    WHOLE_GPU_CALL(handle);
    *reasons = d->reasons;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    WHOLE_GPU_CALL(handle);
    *milliwatts = d->power;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) {
    WHOLE_GPU_CALL(handle);
    *milliwatts = d->limit;
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    WHOLE_GPU_CALL(handle);
    *millijoules = d->energy;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(void *handle, int clock, unsigned *megahertz) {
    WHOLE_GPU_CALL(handle);
    *megahertz = clock == 2 ? d->mem_clock : d->sm;
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(void *handle, int type, int counter, unsigned long long *count) {
    WHOLE_GPU_CALL(handle);
    (void)counter;
    *count = d->ecc[type];
    return SUCCESS;
}

int nvmlDeviceGetRemappedRows(void *handle, unsigned *corrected, unsigned *uncorrected,
                              unsigned *pending, unsigned *failure) {
    WHOLE_GPU_CALL(handle);
    *corrected = d->remapped[0];
    *uncorrected = d->remapped[1];
    *pending = d->remapped[2];
    *failure = d->remapped[3];
    return SUCCESS;
}

int nvmlDeviceGetEncoderUtilization(void *handle, unsigned *percent, unsigned *period) {
    WHOLE_GPU_CALL(handle);
    (void)percent, (void)period;
    return NOT_SUPPORTED; /* an H100 has no encoder */
}

int nvmlDeviceGetDecoderUtilization(void *handle, unsigned *percent, unsigned *period) {
    WHOLE_GPU_CALL(handle);
    *percent = 12;
    *period = 167000;
    return SUCCESS;
}

typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency;
    int type, code;
    union { unsigned narrow; unsigned long long wide; } value;
} field_t;

int nvmlDeviceGetFieldValues(void *handle, int count, field_t *values) {
    WHOLE_GPU_CALL(handle);
    for (int i = 0; i < count; i++) {
        unsigned long long value = values[i].field == 197 ? d->tx : d->rx;
        values[i].code = values[i].field == 197 || values[i].field == 198 ? SUCCESS : NOT_SUPPORTED;
        values[i].type = field_type;
        if (field_type == 1) values[i].value.narrow = (unsigned)value;
        else values[i].value.wide = value;
    }
    return SUCCESS;
}

typedef struct { unsigned pid; unsigned long long memory; unsigned instance, part; } process_t;

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *found) {
    DEVICE_CALL(handle);
    unsigned there = d->process_memory ? 2 : 0;
    if (*count < there) {
        *count = there;
        return INSUFFICIENT_SIZE;
    }
    *count = there;
    if (there) {
        found[0] = (process_t){1, 4096, 0, 0};
        found[1] = (process_t){listed_pid ? listed_pid : (unsigned)getpid(), d->process_memory, 0, 0};
    }
    return SUCCESS;
}

/* What tests call. A device of -1 stands for every device, the function "*" for all. */

void stub_answer(const char *function, int device, int code) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < rule_count && (strcmp(rules[i].function, function) || rules[i].device != device)) i++;
    rules[i == rule_count ? new_rule(function, device) : i].code = code;
    pthread_mutex_unlock(&lock);
}

unsigned stub_calls(const char *function) {
    unsigned calls = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < rule_count; i++)
        if (!strcmp(rules[i].function, function)) calls += rules[i].calls;
    pthread_mutex_unlock(&lock);
    return calls;
}

void stub_hang_on(const char *function, int device) {
    pthread_mutex_lock(&lock);
    snprintf(hanging, NAME, "%s", function);
    hanging_device = device;
    pthread_cond_broadcast(&released);
    pthread_mutex_unlock(&lock);
}

/* "" lets all that hang return. */
void stub_hang(const char *function) { stub_hang_on(function, EVERY); }

/* As other code of the process that lets go of more than it took. */
void stub_shut_down(void) { references = 0; }
int stub_references(void) { return references; }

void stub_mig(int on) { mig = on; }
void stub_present(int device, int there) { present[device] = there; }
void stub_reasons(int device, unsigned long long reasons) { devices[device].reasons = reasons; }
void stub_remapped(int device, int pending, int failure) {
    devices[device].remapped[2] = (unsigned)pending;
    devices[device].remapped[3] = (unsigned)failure;
}
void stub_garble(int device) { devices[device].serial = "\xff\xfe"; }
void stub_pid(unsigned pid) { listed_pid = pid; }
void stub_power(int device, unsigned milliwatts) { devices[device].power = milliwatts; }
void stub_memory(int device, unsigned long long used) { devices[device].used = used; }
void stub_ecc(int device, unsigned long long corrected) { devices[device].ecc[0] = corrected; }
void stub_io(int device, unsigned long long tx, unsigned long long rx, int type) {
    devices[device].tx = tx;
    devices[device].rx = rx;
    field_type = type;
}
