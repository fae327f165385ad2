/*
 * Loaded into nbd-client (LD_PRELOAD) so that a device outlives its server. The kernel can do it: with a timeout for dead
 * connections it keeps requests while there is no connection, and takes new sockets for a device that is in use. nbd-client sends
 * neither before its version 3.27. What it is about to send to the kernel is changed as the environment says:
 *   NBD_DEAD_SECONDS   how long requests wait for a new connection
 *   NBD_AGAIN          new sockets for the device, which is there, instead of a new device
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

enum { family_control = 0x10, command_connect = 1, command_reconfigure = 3, attribute_dead_timeout = 8 };

typedef void *put_header(void *message, uint32_t port, uint32_t sequence, int family, int header_bytes, int flags, uint8_t command,
                         uint8_t version);
typedef int put_attribute(void *message, int type, int length_bytes, const void *data);

void *genlmsg_put(void *message, uint32_t port, uint32_t sequence, int family, int header_bytes, int flags, uint8_t command,
                  uint8_t version) {
  put_header *put = (put_header *)dlsym(RTLD_NEXT, "genlmsg_put");
  /* The question for the number of the kernel's NBD goes to another family. */
  int is_connect = family != family_control && command == command_connect;
  if (is_connect && getenv("NBD_AGAIN") != NULL) command = command_reconfigure;
  void *header = put(message, port, sequence, family, header_bytes, flags, command, version);
  const char *seconds = getenv("NBD_DEAD_SECONDS");
  if (is_connect && header != NULL && seconds != NULL) {
    uint64_t value = strtoull(seconds, NULL, 10);
    ((put_attribute *)dlsym(RTLD_NEXT, "nla_put"))(message, attribute_dead_timeout, sizeof value, &value);
  }
  return header;
}
