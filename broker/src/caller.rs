//! Calls between brokers: how a broker shows that it is one.
//!
//! Each process draws a key at its start and writes it into the region. Only who maps the region knows it, and could do
//! with the region's memory what it likes anyway.

use embarcadero_cxl::broker_table::{publish_call_key, read_call_key};
use embarcadero_cxl::{Fabric, Region};
use embarcadero_wire::BrokerId;
use tonic::Status;

/// Broker as it names itself in its calls to other brokers. Nothing prints the key.
#[derive(Clone, Copy)]
pub struct Caller {
    /// Broker that calls.
    pub(crate) broker: BrokerId,
    /// Key that its row in the region has.
    pub(crate) call_key: u64,
}

impl Caller {
    /// Draws the key of this process, and writes it into the region. Calls of earlier processes of this broker are
    /// refused from then on.
    pub fn draw<F: Fabric>(region: &Region<F>, broker: BrokerId) -> Self {
        let call_key = rand::random::<u64>().max(1);
        publish_call_key(region, broker, call_key);
        Self { broker, call_key }
    }

    /// Checks that the process that calls is the broker that it names.
    ///
    /// # Errors
    /// Permission denied.
    #[allow(clippy::result_large_err)] // tonic's own error type
    pub(crate) fn check<F: Fabric>(self, region: &Region<F>) -> Result<BrokerId, Status> {
        if read_call_key(region, self.broker) == Some(self.call_key) {
            return Ok(self.broker);
        }
        let text = format!("only brokers call this, and the call_key is not that of broker {}", self.broker);
        Err(Status::permission_denied(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::region;
    use tonic::Code;

    #[test]
    fn a_call_is_that_of_a_broker_only_with_the_key_of_its_last_process() {
        let region = region();
        let refused = |caller: Caller| caller.check(&region).map_err(|status| status.code());
        // It never ran, and the region has two brokers.
        for broker in [BrokerId(0), BrokerId(2), BrokerId(u32::MAX)] {
            assert_eq!(refused(Caller { broker, call_key: 0 }), Err(Code::PermissionDenied));
        }
        let first = Caller::draw(&region, BrokerId(0));
        assert_eq!(refused(first), Ok(BrokerId(0)));
        assert_eq!(refused(Caller { broker: BrokerId(1), ..first }), Err(Code::PermissionDenied));
        assert_eq!(refused(Caller { call_key: first.call_key ^ 1, ..first }), Err(Code::PermissionDenied));
        let second = Caller::draw(&region, BrokerId(0));
        assert_eq!((refused(first), refused(second)), (Err(Code::PermissionDenied), Ok(BrokerId(0))));
    }
}
