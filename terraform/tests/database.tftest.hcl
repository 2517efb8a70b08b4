# What apply creates and outputs, without IBM Cloud: terraform test

mock_provider "ibm" {
  mock_data "ibm_resource_group" {
    defaults = { id = "default-group" }
  }

  mock_resource "ibm_database" {
    defaults = {
      id                      = "crn:v1:bluemix:public:databases-for-elasticsearch:eu-de:a/1:2::"
      resource_controller_url = "https://cloud.ibm.com/services/crn"
    }
  }

  mock_data "ibm_database_connection" {
    defaults = {
      https = [{
        hosts       = [{ hostname = "2.databases.appdomain.cloud", port = 31000 }]
        certificate = [{ certificate_base64 = "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCg==", name = "ca" }]
        composed    = []
        scheme      = "https", type = "uri", path = "", query_options = {}, ssl = true, authentication = []
        browser     = false, bundle = [], ca_base64 = ""
      }]
    }
  }
}

variables {
  ibmcloud_api_key = "key"
  region           = "eu-de"
  elastic_password = "a-Z_0-9_longest"
}

run "three_variables_are_enough" {
  command = apply

  assert {
    condition     = output.ES_URL == "https://admin:a-Z_0-9_longest@2.databases.appdomain.cloud:31000"
    error_message = "ES_URL must be user, password, host and port as they can be exported."
  }

  assert {
    condition     = output.ES_CA_CERT == "-----BEGIN CERTIFICATE-----\n"
    error_message = "ES_CA_CERT must be the certificate itself."
  }

  assert {
    condition     = output.crn == ibm_database.elasticsearch.id && output.name == "image-similarity-search" && output.console_url == "https://cloud.ibm.com/services/crn"
    error_message = "The outputs must lead to the database in the console."
  }

  assert {
    condition     = ibm_database.elasticsearch.location == "eu-de"
    error_message = "The region must reach the database."
  }

  assert {
    condition     = ibm_database.elasticsearch.service == "databases-for-elasticsearch" && ibm_database.elasticsearch.plan == "enterprise" && ibm_database.elasticsearch.version == "8.19" && ibm_database.elasticsearch.service_endpoints == "public"
    error_message = "The defaults must be a public Elasticsearch 8.19 on the enterprise plan."
  }

  assert {
    condition = (
      one(ibm_database.elasticsearch.group).group_id == "member" &&
      one(one(ibm_database.elasticsearch.group).host_flavor).id == "multitenant" &&
      length(one(ibm_database.elasticsearch.group).memory) == 0 &&
      length(one(ibm_database.elasticsearch.group).disk) == 0
    )
    error_message = "The default must be shared machines, with no size set."
  }

  assert {
    condition     = length(ibm_database.elasticsearch.allowlist) == 0
    error_message = "By default there must be no allowlist."
  }

  assert {
    condition     = ibm_database.elasticsearch.timeouts.create == "120m" && ibm_database.elasticsearch.timeouts.update == "120m" && ibm_database.elasticsearch.timeouts.delete == "15m"
    error_message = "The timeouts must be those of IBM's module."
  }

  assert {
    condition     = ibm_database.elasticsearch.resource_group_id == "default-group" && data.ibm_resource_group.this.is_default && ibm_database.elasticsearch.deletion_protection != true
    error_message = "The database must be in the default group and deletable."
  }

  assert {
    condition     = data.ibm_database_connection.this.endpoint_type == "public"
    error_message = "The outputs must give the public address."
  }
}

run "what_is_asked_for_reaches_the_database" {
  command = apply

  variables {
    resource_group      = "tutorials"
    member_memory_mb    = 4096
    member_disk_mb      = 5120
    tags                = ["team:search", "tutorial"]
    allowlist           = ["203.0.113.7", "198.51.100.9/24"]
    deletion_protection = true
  }

  assert {
    condition     = data.ibm_resource_group.this.name == "tutorials"
    error_message = "The group must be looked up by name."
  }

  assert {
    condition = (
      one(ibm_database.elasticsearch.group).group_id == "member" &&
      one(one(ibm_database.elasticsearch.group).host_flavor).id == "multitenant" &&
      one(one(ibm_database.elasticsearch.group).memory).allocation_mb == 4096 &&
      one(one(ibm_database.elasticsearch.group).disk).allocation_mb == 5120
    )
    error_message = "Memory and disk of each member must reach the database, on shared machines."
  }

  assert {
    condition     = ibm_database.elasticsearch.tags == toset(["team:search", "tutorial"])
    error_message = "The tags must reach the database."
  }

  assert {
    condition     = toset([for entry in ibm_database.elasticsearch.allowlist : entry.address]) == toset(["203.0.113.7/32", "198.51.100.0/24"])
    error_message = "Every address and range must reach the database, as a CIDR range."
  }

  assert {
    condition     = ibm_database.elasticsearch.deletion_protection
    error_message = "The protection must reach the database."
  }
}

run "private_endpoints_give_the_private_address" {
  command = apply

  variables {
    service_endpoints = "private"
  }

  assert {
    condition     = data.ibm_database_connection.this.endpoint_type == "private" && ibm_database.elasticsearch.service_endpoints == "private"
    error_message = "A private database has a private address only."
  }
}

run "platinum_on_isolated_machines_with_both_endpoints" {
  command = apply

  variables {
    plan              = "platinum"
    host_flavor       = "b3c.4x16.encrypted"
    service_endpoints = "public-and-private"
  }

  assert {
    condition = (
      ibm_database.elasticsearch.plan == "platinum" &&
      one(one(ibm_database.elasticsearch.group).host_flavor).id == "b3c.4x16.encrypted" &&
      length(one(ibm_database.elasticsearch.group).memory) == 0 &&
      length(one(ibm_database.elasticsearch.group).disk) == 0
    )
    error_message = "Plan and flavor must reach the database; an isolated flavor brings its own memory and disk."
  }

  assert {
    condition     = data.ibm_database_connection.this.endpoint_type == "public"
    error_message = "With both, the public address is given."
  }
}
