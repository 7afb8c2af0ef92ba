/* What bindgen reads. verbs.h redirects some calls by macro, to inline functions that zero what an older library does
 * not fill in. bindgen does not see macros and would bind the bare symbols, so each such call is wrapped here. */
#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

static inline int embarcadero_ibv_query_port(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attributes)
{
	return ibv_query_port(context, port, attributes);
}

static inline struct ibv_mr *embarcadero_ibv_reg_mr(struct ibv_pd *pd, void *address, size_t length, int access)
{
	return ibv_reg_mr(pd, address, length, access);
}
